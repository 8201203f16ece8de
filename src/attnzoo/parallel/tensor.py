"""Tensor parallelism: the ranks of a group share the heads of every mixer and the channels of every MLP.

All ranks enter a layer with the same x, whose gradient is the sum of theirs (`Share.enter`); each computes
whole heads with its own rows and columns of the weights, all in plain local tensors; and what the heads of
each add to the stream is summed (`Share.leave`). In between, what several ranks hold (a map that all heads
share, key heads fewer than ranks) has a part of its gradient on each of them, and `sync_gradients` adds the
parts up. Parameters outside, such as the embedding and the norms, have the same gradient everywhere.

A parameter in between carries `Shards` as ``p.shards``: which rows of the full one are here, and who has the
same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from attnzoo.parallel.gradients import norm_weight, sync_gradients
from attnzoo.parallel.pieces import Block, Shards, assemble, own, put_shards, shards_of

__all__ = [
    "CannotSplit",
    "Part",
    "Shards",
    "Share",
    "assemble",
    "norm_weight",
    "own",
    "put_shards",
    "shards_of",
    "sync_gradients",
]


class CannotSplit(ValueError):
    """Why a stage cannot be shared by ranks."""


class Part(NamedTuple):
    """A rank's heads: the first, and how many."""

    first: int
    count: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)

    @property
    def each(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass(frozen=True)
class Share:
    """One rank's share of the heads.

    Args:
        rank, ranks: its number among those that share. group: through which they meet; None = they do not,
            and what leaves a layer is the rank's summand.
        ways: parts that the heads come in; None = one per rank.
    """

    rank: int
    ranks: int
    group: dist.ProcessGroup | None = None
    ways: int | None = None

    def enter(self, x: Tensor) -> Tensor:
        """x itself; its gradient is the sum over the ranks."""
        return x if self.group is None else _Enter.apply(x, self.group)

    def leave(self, y: Tensor) -> Tensor:
        """The sum of ``y`` over the ranks, each of which has the sum's gradient."""
        return y if self.group is None else _Leave.apply(y, self.group)

    def total(self, z: Tensor) -> Tensor:
        """The sum of ``z`` over the ranks, from which each goes on apart: its gradient is summed as well."""
        if self.group is None:
            raise ValueError("group: a sum over all heads needs the other ranks, got None")
        return _Enter.apply(_Leave.apply(z, self.group), self.group)

    def once(self, loss: Tensor) -> Tensor:
        """A loss that every rank computes from the same numbers: its gradient as a part of their sum."""
        return loss.detach() + (loss - loss.detach()) / self.ranks

    def whole(self) -> Share:
        """The same ranks where each has all heads, and something else is split."""
        return replace(self, ways=1)

    def piece(self, count: int, rank: int | None = None) -> tuple[int, int]:
        """Which piece of ``count`` heads a rank (this one by default) has, and how many pieces there are: one
        per part where they suffice, else one head for several ranks.

        Raises:
            CannotSplit: neither divides the other.
        """
        ways = self.ways or self.ranks
        index = (self.rank if rank is None else rank) * ways // self.ranks
        if count % ways == 0:
            return index, ways
        if ways % count == 0:
            return index * count // ways, count
        raise CannotSplit(f"{count} heads do not divide among {ways} ranks")

    def part(self, count: int) -> Part:
        """The rank's own of ``count`` heads; see `piece`."""
        index, pieces = self.piece(count)
        return Part(index * count // pieces, count // pieces)

    def count(self, heads: int) -> int:
        return self.part(heads).count

    def shapes(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """(heads, width) by name, of the rank."""
        return {name: (self.count(heads), width) for name, (heads, width) in shapes.items()}

    def shards(self, *shapes: tuple, dim: int = 0) -> Shards:
        """Of a dimension in which (heads, width) follow each other, or (heads, width, the piece of each rank)
        where it is not `piece`.
        """
        blocks, start = [], 0
        for heads, width, *given in shapes:
            of = tuple(given[0] if given else (self.piece(heads, rank)[0] for rank in range(self.ranks)))
            pieces = max(of) + 1
            blocks.append(Block(start, heads * width // pieces, pieces, of))
            start += heads * width
        return Shards(self.rank, self.ranks, dim, tuple(blocks))

    def cut(self, module: nn.Module, name: str, *shapes: tuple, dim: int = 0) -> None:
        """Leaves a parameter the rows of the rank's heads, which stand along ``dim`` by `shards`."""
        self.put(getattr(module, name), self.shards(*shapes, dim=dim))

    def put(self, param: nn.Parameter, shards: Shards) -> None:
        """Leaves a parameter its part, in place: flags and ties stay. One that a layer before cut is left."""
        if hasattr(param, "shards"):
            assert param.shards == shards, "two layers cut a parameter that they share in different ways"
            return
        size = sum(b.length * b.pieces for b in shards.blocks)
        assert not shards.blocks or param.shape[shards.dim] == size, (tuple(param.shape), shards)
        param.data = shards.cut(param.data).clone(memory_format=torch.contiguous_format)
        param.shards = shards

    def rows(self, layer: nn.Module, *shapes: tuple) -> None:
        """Of a linear map to heads, those of the rank."""
        self._plain(layer)
        self.cut(layer, "weight", *shapes)
        if layer.bias is not None:
            self.cut(layer, "bias", *shapes)
        layer.out_features = layer.weight.shape[0]

    def columns(self, layer: nn.Module, heads: int, width: int) -> None:
        """Of a linear map from heads, those of the rank; a bias stays, see `bias`.

        Raises:
            CannotSplit: there are fewer heads than parts, so that some would be added twice.
        """
        self._plain(layer)
        if heads % (self.ways or self.ranks):
            raise CannotSplit(f"{heads} heads do not divide among {self.ranks} ranks")
        self.cut(layer, "weight", (heads, width), dim=1)
        self.keep(layer)
        layer.in_features = layer.weight.shape[1]

    def bias(self, layer: nn.Linear) -> Tensor | None:
        """The rank's summand of a bias that is added once."""
        return None if layer.bias is None else layer.bias / self.ranks

    def keep(self, module: nn.Module) -> None:
        """Marks parameters that every rank has whole."""
        for param in module.parameters():
            if not hasattr(param, "shards"):
                param.shards = Shards(self.rank, self.ranks)

    def _plain(self, layer: nn.Module) -> None:
        if type(layer) is not nn.Linear:
            raise CannotSplit("its matrix is put together in every forward, from parts that layers share")


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _added(grad, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _added(y, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _added(z: Tensor, group: dist.ProcessGroup) -> Tensor:
    z = z.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(z, group=group)
    return z
