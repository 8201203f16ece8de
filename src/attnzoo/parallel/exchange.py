"""What ranks that share sequences hand to each other, differentiably: rows, tails, states and sums.

One `Exchange` serves one forward of one layer. All ranks make the same exchanges in the same order, and hand
a state on before they begin the next; autograd runs its nodes in the reverse order of their making, so the
gradients travel in the reverse order on every rank. That holds only if every node runs on every rank,
whatever a rank's own loss depends on: each exchange gets an input that requires a gradient, and `tie` makes
the layer's output depend on each. Gradients are those of ``backward()``; `torch.autograd.grad` leaves nodes
out.

Activation checkpointing runs a block's forward again before its backward: on all ranks at the same place in
that order, so the same exchanges are made again. Rows take a collective; tails and states go from neighbour
to neighbour, so that layers without rows run as a wave: a rank is a layer ahead of the one at its right.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

# newer releases of torch know these by other names and warn of the old ones
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

MOST_AHEAD = 32  # messages that a rank may be ahead of its neighbour


class Group:
    """The channel over torch.distributed (gloo, nccl).

    Args:
        group: the ranks that share sequences, in the order of their parts; None = all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()  # kept until they have left
        self._count: Counter[tuple[str, int]] = Counter()

    def open(self) -> Exchange:
        """For one forward of one layer."""
        return Exchange(self)

    def post(self, z: Tensor, to: int) -> None:
        """Sends without waiting for the receiver."""
        z = z.contiguous()
        sent = self._sent
        while sent and (len(sent) >= MOST_AHEAD or sent[0][0].is_completed()):
            sent.popleft()[0].wait()
        sent.append((dist.isend(z, group=self.group, tag=self._tag("to", to), group_dst=to), z))

    def take(self, like: Tensor, source: int) -> Tensor:
        """Receives what has the shape and dtype of ``like``."""
        found = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(found, group=self.group, tag=self._tag("from", source), group_src=source)
        return found

    def _tag(self, way: str, other: int) -> int:
        """The number of a message: gloo may take two that are under way in another order."""
        self._count[way, other] += 1
        return self._count[way, other] % (1 << 30)

    def collect(self, z: Tensor) -> Tensor:
        """``(ranks, *z.shape)``."""
        found = z.new_empty(self.ranks, *z.shape)
        _all_gather(found.view(-1), z.contiguous().view(-1), group=self.group)
        return found

    def scatter_sum(self, z: Tensor) -> Tensor:
        """``z[rank]`` of ``(ranks, ...)``, summed over the ranks."""
        found = z.new_empty(z.shape[1:])
        _reduce_scatter(found.view(-1), z.contiguous().view(-1), group=self.group)
        return found

    def add(self, z: Tensor) -> Tensor:
        z = z.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(z, group=self.group)
        return z


class Exchange:
    """One forward's exchanges; see the module. ``dim`` is the token axis."""

    def __init__(self, channel: Group) -> None:
        self.channel, self._ties = channel, []

    @torch.compiler.disable
    def gather(self, z: Tensor, dim: int) -> Tensor:
        """The rows of the ranks to the left, then one's own."""
        return self._tied(_Gather.apply(z, _anchor(z), self.channel, dim))[0]

    @torch.compiler.disable
    def extend(self, z: Tensor, n: int, dim: int) -> Tensor:
        """``z`` preceded by the ``n`` tokens before it, or as many as there are."""
        if n == 0:
            return z
        if n > z.shape[dim]:
            both = self.gather(z, dim)
            start = max(0, both.shape[dim] - z.shape[dim] - n)
            return both.narrow(dim, start, both.shape[dim] - start)
        return self._tied(_Extend.apply(z, _anchor(z), self.channel, n, dim))[0]

    @torch.compiler.disable
    def receive(self, like: Tensor) -> Tensor:
        """What the left neighbour sends, of the shape of ``like``; zeros where there is none."""
        if self.channel.rank == 0:
            return torch.zeros_like(like)
        return self._tied(_Receive.apply(_anchor(like), self.channel, like))[0]

    @torch.compiler.disable
    def send(self, value: Tensor) -> None:
        """To the right neighbour, if there is one."""
        if self.channel.rank + 1 < self.channel.ranks:
            self._tied([_Send.apply(value, _anchor(value), self.channel)])

    @torch.compiler.disable
    def total(self, z: Tensor) -> Tensor:
        """The sum over all ranks; its gradient is the sum of what all ranks' losses ask for."""
        return self._tied(_Total.apply(z, _anchor(z), self.channel))[0]

    @torch.compiler.disable
    def tie(self, y: Tensor) -> Tensor:
        """``y``, made to depend on every exchange."""
        ties, self._ties = self._ties, []
        return _Tie.apply(y, *ties) if ties else y

    def _tied(self, found: Sequence[Tensor]) -> list[Tensor]:
        *found, tie = found
        self._ties.append(tie)
        return list(found)


def _anchor(like: Tensor) -> Tensor:
    """Makes a node where its other inputs require no gradient."""
    return torch.zeros((), device=like.device, requires_grad=True)


def _tie(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device)


class _Gather(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, z: Tensor, anchor: Tensor, channel: Group, dim: int
    ) -> tuple[Tensor, Tensor]:
        ctx.channel, ctx.dim, ctx.length = channel, dim, z.shape[dim]
        parts = channel.collect(z)[: channel.rank + 1]
        return torch.cat(parts.unbind(0), dim=dim), _tie(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        channel, parts = ctx.channel, grad.split(ctx.length, dim=ctx.dim)
        wide = grad.new_zeros(channel.ranks, *parts[0].shape)
        for i, part in enumerate(parts):
            wide[i] = part
        return channel.scatter_sum(wide), None, None, None


class _Extend(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, z: Tensor, anchor: Tensor, channel: Group, n: int, dim: int
    ) -> tuple[Tensor, Tensor]:
        ctx.channel, ctx.n, ctx.dim, ctx.length = channel, n, dim, z.shape[dim]
        last = z.narrow(dim, z.shape[dim] - n, n)
        if channel.rank + 1 < channel.ranks:
            channel.post(last, channel.rank + 1)
        if channel.rank == 0:
            return z.clone(), _tie(z)
        return torch.cat([channel.take(last, channel.rank - 1), z], dim=dim), _tie(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        channel, n, dim, T = ctx.channel, ctx.n, ctx.dim, ctx.length
        own = grad.narrow(dim, grad.shape[dim] - T, T).clone()
        if channel.rank:
            channel.post(grad.narrow(dim, 0, n), channel.rank - 1)
        if channel.rank + 1 < channel.ranks:
            last = own.narrow(dim, T - n, n)
            last += channel.take(last, channel.rank + 1)
        return own, None, None, None, None


class _Receive(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, anchor: Tensor, channel: Group, like: Tensor) -> tuple[Tensor, Tensor]:
        ctx.channel = channel
        return channel.take(like, channel.rank - 1), _tie(anchor)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        ctx.channel.post(grad, ctx.channel.rank - 1)
        return None, None, None


class _Send(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, anchor: Tensor, channel: Group) -> Tensor:
        ctx.channel, ctx.shape, ctx.dtype = channel, value.shape, value.dtype
        channel.post(value, channel.rank + 1)
        return _tie(anchor)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, tie: Tensor) -> tuple[Tensor | None, ...]:
        like = tie.new_empty(ctx.shape, dtype=ctx.dtype)
        return ctx.channel.take(like, ctx.channel.rank + 1), None, None


class _Total(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, anchor: Tensor, channel: Group) -> tuple[Tensor, Tensor]:
        ctx.channel = channel
        return channel.add(z), _tie(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.channel.add(grad), None, None


class _Tie(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, *ties: Tensor) -> Tensor:
        ctx.count = len(ties)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Any, ...]:
        return grad, *(torch.zeros((), device=grad.device) for _ in range(ctx.count))
