"""What ranks that share sequences hand to each other, differentiably: rows, tails, states and sums.

One `Exchange` serves one forward of one layer. All ranks run the same program, so they exchange the same
things in the same order; autograd runs its nodes in the reverse order of their making, so the gradients
travel in the reverse order on every rank. That holds only if every node runs on every rank, whatever a rank's
own loss depends on: each exchange gets an input that requires a gradient, and `tie` makes the layer's output
depend on each. Gradients are those of ``backward()``; `torch.autograd.grad` leaves nodes out.

Activation checkpointing runs a block's forward again before its backward: on all ranks at the same place in
that order, so the same exchanges are made again. Rows take a collective; tails and states go from neighbour
to neighbour, so that layers without rows run as a wave: a rank is a layer ahead of the one at its right.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

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

    def open(self) -> Exchange:
        """For one forward of one layer."""
        return Exchange(self)

    def post(self, z: Tensor, to: int) -> None:
        """Sends without waiting for the receiver."""
        z = z.contiguous()
        sent = self._sent
        while sent and (len(sent) >= MOST_AHEAD or sent[0][0].is_completed()):
            sent.popleft()[0].wait()
        sent.append((dist.isend(z, group=self.group, group_dst=to), z))

    def take(self, like: Tensor, source: int) -> Tensor:
        """Receives what has the shape and dtype of ``like``."""
        found = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(found, group=self.group, group_src=source)
        return found

    def collect(self, z: Tensor) -> Tensor:
        """``(ranks, *z.shape)``."""
        found = z.new_empty(self.ranks, *z.shape)
        dist.all_gather_into_tensor(found, z.contiguous(), group=self.group)
        return found

    def scatter_sum(self, z: Tensor) -> Tensor:
        """``z[rank]`` of ``(ranks, ...)``, summed over the ranks."""
        found = torch.empty_like(z[0])
        dist.reduce_scatter_tensor(found, z.contiguous(), group=self.group)
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
    def receive(self, like: Sequence[Tensor]) -> list[Tensor]:
        """What the left neighbour sends, of the shapes of ``like``; zeros where there is none."""
        if self.channel.rank == 0:
            return [torch.zeros_like(z) for z in like]
        return self._tied(_Receive.apply(_anchor(like[0]), self.channel, *like))

    @torch.compiler.disable
    def send(self, values: Sequence[Tensor]) -> None:
        """To the right neighbour, if there is one."""
        if self.channel.rank + 1 < self.channel.ranks:
            self._tied([_Send.apply(_anchor(values[0]), self.channel, *values)])

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
    def forward(ctx: FunctionCtx, anchor: Tensor, channel: Group, *like: Tensor) -> tuple[Tensor, ...]:
        ctx.channel = channel
        return *(channel.take(z, channel.rank - 1) for z in like), _tie(anchor)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        for grad in grads[:-1]:
            ctx.channel.post(grad, ctx.channel.rank - 1)
        return None, None, *(None for _ in grads[:-1])


class _Send(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, anchor: Tensor, channel: Group, *values: Tensor) -> Tensor:
        ctx.channel, ctx.like = channel, [torch.empty_like(z, device="meta") for z in values]
        ctx.device = anchor.device
        for z in values:
            channel.post(z.detach(), channel.rank + 1)
        return _tie(anchor)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, _: Tensor) -> tuple[Tensor | None, ...]:
        channel = ctx.channel
        like = (torch.empty_like(z, device=ctx.device) for z in ctx.like)
        return None, None, *(channel.take(z, channel.rank + 1) for z in like)


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
