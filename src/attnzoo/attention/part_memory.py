"""Memory of one part of a sequence: the earlier tokens come from the ranks to the left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnzoo.attention.memory import Memory
from attnzoo.attention.slots import Retain, Slot
from attnzoo.attention.timeline import Axis, Timeline

if TYPE_CHECKING:
    from attnzoo.parallel.context import Span


class PartMemory(Memory):
    """The slots as one forward of a part sees them: as in chunked prefill, on from what is to the left.

    States come at the first use and go at `close`, all of a layer at once and in the order of their
    declaration, so that ranks whose stages ask in another order cannot wait for each other.

    Args:
        x: the layer's input, for batch, device and dtype. slots: as declared. retain: what masks need of the
            past: nearer keys than a window's are not exchanged.
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
        self._came: dict[str, Tensor] | None = None
        self._goes: dict[str, Tensor] = {}

    @property
    def _first(self) -> int:
        """The first token whose row is here."""
        return 0 if self.reach is None else max(0, self.line.past - self.reach)

    def rows(self, name: str, new: Tensor) -> Tensor:
        return self.link.gather(new, 2) if self.reach is None else self.link.extend(new, self.reach, 2)

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
        both = self.link.extend(z, n, 1)
        return torch.nn.functional.pad(both, (0, 0, n + z.shape[1] - both.shape[1], 0))

    def state(self, name: str) -> Tensor:
        return self._received()[name]

    def _received(self) -> dict[str, Tensor]:
        if self._came is None:
            self._came = dict(zip(self._like, self.link.receive(list(self._like.values())), strict=True))
        return self._came

    def put(self, name: str, value: Tensor) -> None:
        self._goes[name] = value.to(self._like[name].dtype).expand_as(self._like[name])

    def total(self, z: Tensor) -> Tensor:
        return self.link.total(z)

    def close(self, y: Tensor) -> Tensor:
        if self._like:
            # what this part has not changed goes on as it came
            both = self._received() | self._goes
            self.link.send([both[name] for name in self._like])
        return self.link.tie(y)
