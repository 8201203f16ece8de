"""Gradients where ranks share heads: adding up those of what several ranks hold, and how to count them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnzoo.parallel.pieces import Block, Shards, local_part

if TYPE_CHECKING:
    from attnzoo.parallel.tensor import Share

BUCKET = 1 << 25  # numbers in one all-reduce


class _Shared(NamedTuple):
    """Rows of a parameter that several ranks hold, in the rank's local tensor.

    Args:
        dim, start, length: where. pieces: how many different ones the ranks hold in that place; index: which
            of them is here.
    """

    param: nn.Parameter
    dim: int
    start: int
    length: int
    pieces: int
    index: int

    @property
    def numel(self) -> int:
        local = local_part(self.param)
        return (
            self.pieces * self.length * (local.numel() // max(local.shape[self.dim], 1) if local.dim() else 1)
        )

    def view(self, flat: Tensor) -> Tensor:
        """The rank's piece in a buffer for all of them."""
        rows = local_part(self.param)
        rows = rows if rows.dim() == 0 else rows.narrow(self.dim, self.start, self.length)
        return flat.view(self.pieces, *rows.shape)[self.index]


@torch.no_grad()
def sync_gradients(model: nn.Module, share: Share) -> None:
    """Adds up, over the ranks, the gradients of what several ranks hold between `enter` and `leave`.

    Once after all backward passes of a step, on every rank. Parameters and gradients may be FSDP2's, sharded
    over other ranks. A parameter that has a gradient on some ranks only gets one on all.
    """
    if share.group is None:
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[_Shared]] = {}
    for param in model.parameters():
        for shared in _shared_rows(param) if param.requires_grad else ():
            local = local_part(param)
            by_kind.setdefault((local.dtype, local.device), []).append(shared)
    for (dtype, device), every in by_kind.items():
        for some in _buckets(every):
            _sum(some, dtype, device, share.group)


def _sum(some: list[_Shared], dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup) -> None:
    sizes = [shared.numel for shared in some]
    # behind the gradients, how many ranks have each
    flat = torch.zeros(sum(sizes) + len(some), dtype=dtype, device=device)
    *parts, has = flat.split([*sizes, len(some)])
    for i, (shared, part) in enumerate(zip(some, parts, strict=True)):
        if shared.param.grad is not None:
            shared.view(part).copy_(_rows(shared))
            has[i] = 1
    dist.all_reduce(flat, group=group)
    for i, (shared, part) in enumerate(zip(some, parts, strict=True)):
        if shared.param.grad is None:
            if not has[i]:
                continue
            shared.param.grad = torch.zeros_like(shared.param)
        _rows(shared).copy_(shared.view(part))


def _rows(shared: _Shared) -> Tensor:
    grad = local_part(shared.param.grad)
    return grad if grad.dim() == 0 else grad.narrow(shared.dim, shared.start, shared.length)


def _buckets(every: list[_Shared]) -> Iterator[list[_Shared]]:
    some: list[_Shared] = []
    size = 0
    for shared in every:
        if some and size + shared.numel > BUCKET:
            yield some
            some, size = [], 0
        some.append(shared)
        size += shared.numel
    if some:
        yield some


def norm_weight(param: nn.Parameter, ranks: int) -> float | Tensor:
    """What the square of an element of the local gradient counts in a sum over ``ranks``: one over the number
    of those that hold it; a tensor that broadcasts where rows differ in it.
    """
    shards: Shards | None = getattr(param, "shards", None)
    if shards is None or not shards.blocks:
        return 1 / ranks
    weights = [b.pieces / ranks for b in shards.blocks]
    if len(set(weights)) == 1:
        return weights[0]
    local = local_part(param)
    found = torch.zeros(local.shape[shards.dim], dtype=local.dtype, device=local.device)
    for (start, length, _), weight in zip(_windows(param, shards), weights, strict=True):
        found[start : start + length] = weight
    return found.view(-1, *(1,) * (local.dim() - shards.dim - 1))


def _shared_rows(param: nn.Parameter) -> Iterator[_Shared]:
    """What other ranks hold as well."""
    shards: Shards | None = getattr(param, "shards", None)
    if shards is None:
        return
    if not shards.blocks:
        local = local_part(param)
        yield _Shared(param, 0, 0, local.shape[0] if local.dim() else 1, 1, 0)
        return
    for start, length, block in _windows(param, shards):
        if block.pieces < shards.ranks:
            yield _Shared(param, shards.dim, start, length, block.pieces, block.of[shards.rank])


def _windows(param: nn.Parameter, shards: Shards) -> Iterator[tuple[int, int, Block]]:
    """First row and length of each block in the local tensor, which may be a window of the rank's part."""
    local, first, at = local_part(param), _offset(param)[shards.dim], 0
    last = first + local.shape[shards.dim]
    for block in shards.blocks:
        start, stop = max(at, first), min(at + block.length, last)
        yield start - first if stop > start else 0, max(stop - start, 0), block
        at += block.length


def _offset(param: Tensor) -> tuple[int, ...]:
    """Of the local tensor in the parameter."""
    if not hasattr(param, "to_local"):
        return (0,) * param.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)[1]
