"""Which part of a tensor a rank holds: cutting it, and putting the full one together from the ranks' parts.

For parameters, and for what has their shape: gradients, the state of an optimiser.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from attnzoo.parallel.tensor import Share


class Block(NamedTuple):
    """Rows of a full tensor in equal pieces.

    Args:
        start: first row. length: rows of a piece. pieces: their number. of: the piece of each rank; each
            piece has equally many ranks.
    """

    start: int
    length: int
    pieces: int
    of: tuple[int, ...]


@dataclass(frozen=True)
class Shards:
    """Which part of a full tensor a rank holds: its pieces of all blocks along ``dim``, one after the other.

    Args:
        rank, ranks: who, of how many. blocks: together the full tensor; none = every rank holds all of it.
    """

    rank: int
    ranks: int
    dim: int = 0
    blocks: tuple[Block, ...] = ()

    def cut(self, full: Tensor) -> Tensor:
        """The rank's part."""
        if not self.blocks:
            return full
        rows = (full.narrow(self.dim, b.start + b.of[self.rank] * b.length, b.length) for b in self.blocks)
        return torch.cat(list(rows), dim=self.dim)

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """The full tensor from the parts of all ranks, in order."""
        parts = list(parts)
        if not self.blocks:
            return parts[0]
        shape = list(parts[0].shape)
        shape[self.dim] = sum(b.length * b.pieces for b in self.blocks)
        full = parts[0].new_empty(shape)
        for rank, part in enumerate(parts):
            rows = part.split([b.length for b in self.blocks], dim=self.dim)
            for b, own in zip(self.blocks, rows, strict=True):
                full.narrow(self.dim, b.start + b.of[rank] * b.length, b.length).copy_(own)
        return full


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that FSDP2 spreads, sharing its memory; another one itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def shards_of(model: nn.Module) -> dict[str, Shards]:
    """By name, of all parameters that have it; tied ones under every name."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: p.shards for name, p in named if hasattr(p, "shards")}


def put_shards(model: nn.Module, marks: Mapping[str, Shards]) -> None:
    """Writes what `shards_of` gave on parameters that took the place of those."""
    for name, param in model.named_parameters(remove_duplicate=False):
        if name in marks:
            param.shards = marks[name]


def own(full: Tensor, shards: Shards | None) -> Tensor:
    """The rank's part of a full parameter, or of what has its shape; all of it without ``shards``."""
    return full if shards is None else shards.cut(full)


def assemble(local: Tensor, shards: Shards | None, share: Share) -> Tensor:
    """The full tensor from the ranks' parts, a parameter or what has its shape; all ranks must call it."""
    if shards is None or not shards.blocks or shards.ranks == 1:
        return local
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(shards.ranks)]
    dist.all_gather(parts, local.contiguous(), group=share.group)
    return shards.join(parts)
