"""One rank's part of every sequence: where its tokens stand, and a memory that the ranks to the left fill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnzoo.attention.memory import Memory
from attnzoo.attention.slots import Retain, Slot
from attnzoo.attention.timeline import Axis, Clock, Timeline, Whole

if TYPE_CHECKING:
    from attnzoo.parallel.context import Link, Span


class PartMemory(Memory):
    """The slots as one forward of a part sees them: as in chunked prefill, on from what is to the left.

    All ranks must exchange the same in the same order, or they wait for each other for ever: a layer's stages
    ask alike whatever the part holds, and put a state before they ask for anything else.

    Args:
        x: the layer's input, for batch, device and dtype. slots: as declared. retain: what masks need of the
            past: keys that are further than a window reaches are not exchanged.
    """

    alone = False
    aligned = True

    def __init__(
        self, line: Timeline, span: Span, x: Tensor, slots: Mapping[str, Slot], retain: Retain | None
    ) -> None:
        super().__init__(line, None)
        self.link = span.channel.open()
        # sinks may stand anywhere in packed rows
        self.reach = None if retain is None or retain.sinks else retain.window - 1
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self._like = {
            name: torch.empty(x.shape[0], *slot.shape, dtype=wide, device=x.device)
            for name, slot in slots.items()
            if slot.kind == "state" or slot.carried
        }
        self._came: dict[str, Tensor] = {}
        self._open: str | None = None  # the state that is to be put

    @property
    def _first(self) -> int:
        """The first token whose row is here."""
        return 0 if self.reach is None else max(0, self.line.past - self.reach)

    def rows(self, name: str, new: Tensor) -> Tensor:
        link = self._idle()
        return link.gather(new, 2) if self.reach is None else link.extend(new, self.reach, 2)

    def axis(self) -> Axis:
        first = self._first
        return self.line.once(("keys", first), lambda: self._axis(first))

    def _axis(self, first: int) -> Axis:
        order, doc, _ = self.line.whole
        return Axis(order[:, first:], None if doc is None else doc[:, first:], ("rows", first))

    def places(self) -> Tensor:
        first = self._first
        return self.line.once(("places", first), lambda: self.line.whole.pos[:, first:])

    def tail(self, name: str, z: Tensor, n: int) -> Tensor:
        both = self._idle().extend(z, n, 1)
        return torch.nn.functional.pad(both, (0, 0, n + z.shape[1] - both.shape[1], 0))

    def state(self, name: str) -> Tensor:
        if name not in self._came:
            self._came[name] = self._idle().receive(self._like[name])
            self._open = name
        return self._came[name]

    def put(self, name: str, value: Tensor) -> None:
        assert self._open == name, f"{name!r} is put while {self._open!r} is open"
        like, self._open = self._like[name], None
        self.link.send(value.to(like.dtype).expand_as(like))

    def total(self, z: Tensor) -> Tensor:
        return self._idle().total(z)

    def close(self, y: Tensor) -> Tensor:
        link = self._idle()
        assert self._came.keys() == self._like.keys(), (
            f"not handed on: {self._like.keys() - self._came.keys()}"
        )
        return link.tie(y)

    def _idle(self) -> Link:
        """The link, between two exchanges."""
        assert self._open is None, f"{self._open!r} must be put before the next exchange"
        return self.link


def part_of(line: Timeline, span: Span) -> Timeline:
    """The reading of one rank's part of sequences, as that of a chunk whose past is cached.

    Raises:
        ValueError: there is a cache, padding stands before a token, or parts would be of unequal lengths.
    """
    if line.clock is not None:
        raise ValueError("span: is for training, which has no cache, got one; decode without a span")
    if line.perm is not None:
        raise ValueError(
            "segment_ids: padding must stand at the end of each row where ranks share sequences, "
            "got some before a token; move it there"
        )
    own = span.cut(line.order)
    length = own.shape[1]
    start = span.rank * length
    order, pos = line.order[:, : start + length], line.pos[:, : start + length]
    clock = Clock(length=start)
    if line.doc is None:
        return Timeline(length, own, pos[:, start:], clock=clock, whole=Whole(order, None, pos))
    doc, seen = line.doc[:, : start + length], torch.zeros_like(order[:, 0])
    if start:
        last = doc[:, start - 1 : start]
        doc, seen = torch.where(doc >= last, doc - last, -1), order[:, start - 1] + 1
    clock.used = torch.full_like(seen, start)
    clock.start, clock.position = clock.used - seen, pos[:, start - 1] + 1 if start else seen
    valid = None if line.valid is None else span.cut(line.valid)
    return Timeline(
        length,
        own,
        pos[:, start:],
        doc[:, start:],
        None if valid is None or bool(valid.all()) else valid,
        clock=clock,
        base=clock.used,
        ident=span.cut(line.ident),
        whole=Whole(order, doc, pos),
    )
