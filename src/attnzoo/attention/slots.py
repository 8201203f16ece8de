"""What stages declare that they keep between calls, and the cache that holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.attention.timeline import Clock


class Slot(NamedTuple):
    """One declared piece of memory, per batch row.

    Args:
        kind: "rows" (one per token, or a ring of them), "blocks" (one per ``per`` tokens of a document, once
            they are complete), "tail" (the last tokens' values) or "state".
        shape: rows and blocks ``(heads, width)``; tail ``(tokens, channels)``; state any.
        per: tokens per block.
        wide: blocks that are states: kept, as states are, in fp32 or fp64.
        carried: a tail that its stage reads and keeps as a state, by `state` and `put`.
    """

    kind: str
    shape: tuple[int, ...]
    per: int = 1
    wide: bool = False
    carried: bool = False

    @property
    def size(self) -> int:
        return int(torch.Size(self.shape).numel())

    def item(self, dtype: torch.dtype, state_size: int) -> int:
        """Bytes of one number, of a cache of ``dtype`` whose states take ``state_size``."""
        return state_size if self.kind == "state" or self.wide else dtype.itemsize


class Retain(NamedTuple):
    """How many rows a mask can still need: the first ``sinks`` and the last ``window`` of a document."""

    sinks: int
    window: int

    @property
    def size(self) -> int:
        return self.sinks + self.window


@dataclass
class Cache:
    """The memory of one mixer, or of one layer of a model.

    Args:
        slots: tensors by slot name, batch first.
        clock: how far its rows have come.
        retain: set where rows are rings.
        batch: rows of the batch.
    """

    slots: dict[str, Tensor]
    clock: Clock
    retain: Retain | None = None
    batch: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of what the method stores; the clock (a few integers per row) is not counted."""
        return sum(t.numel() * t.element_size() for t in self.slots.values())

    @property
    def length(self) -> int:
        """Tokens seen; in rows of unequal length an upper bound."""
        return self.clock.length


def build_cache(
    slots: dict[str, Slot],
    retain: Retain | None,
    batch: int,
    max_len: int,
    dtype: torch.dtype,
    device: torch.device | str,
    double: bool,
    clock: Clock | None = None,
) -> Cache:
    """Zeroed memory for ``batch`` rows; ``double`` keeps states in fp64."""
    for field, value in (("batch_size", batch), ("max_len", max_len)):
        if value < 1:
            raise ValueError(f"{field}: must be at least 1, got {value}")
    state_dtype = torch.float64 if double else torch.float32
    room = retain.size if retain else max_len
    tensors = {}
    for name, slot in slots.items():
        shape = (slot.shape[0], room, slot.shape[1]) if slot.kind == "rows" else slot.shape
        if slot.kind == "blocks":
            shape = (-(-max_len * slot.size // slot.per),)  # the last block may not get complete
        kind_dtype = state_dtype if slot.kind == "state" or slot.wide else dtype
        tensors[name] = torch.zeros(batch, *shape, dtype=kind_dtype, device=device)
    clock = clock or Clock()
    grow = {"blocks"} if retain else {"rows", "blocks"}
    if any(slot.kind in grow for slot in slots.values()):
        clock.room = max_len
    return Cache(tensors, clock, retain, batch)
