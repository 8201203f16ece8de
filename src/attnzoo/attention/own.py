"""OwnAttention: core -> combine -> out -> after, for what is another architecture than scores or one scan.

A core is one stage with the same contract as everything else: it mixes tokens causally, within documents,
with a declared memory. `Parallel` is the core of several branches, each an ordinary mixer without its output
projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Choices, Mixer, Stage, same
from attnzoo.attention.call import Call
from attnzoo.attention.slots import Retain
from attnzoo.attention.stages.combine import combined
from attnzoo.cost import Work


class Core(Stage):
    """The mixing of an architecture of its own: ``core(call) -> (B, T, H, d_v)``."""

    def retain(self) -> Retain | None:
        """What its cached rows still need; None = everything."""
        return None

    def choose(self, asked: str) -> Choices:
        """The implementation for the option ``impl``.

        Raises:
            ValueError: it does not run this core.
        """
        if asked not in ("auto", "reference"):
            raise ValueError(f"impl: {asked!r} does not run this mixer, which is plain torch; use auto")
        return same("reference", "plain torch, the only implementation")


class AsIs(Stage):
    """Output stage that passes heads on: of a branch, or of a core that ends at the stream itself."""

    def forward(self, o: Tensor, call: Call) -> Tensor:
        return o


class Flat(Stage):
    """Output stage that puts the heads side by side, without a projection."""

    unsplit = "its heads are channels of the stream, without an output projection"

    def forward(self, o: Tensor, call: Call) -> Tensor:
        return o.flatten(2)


class Parallel(Core):
    """Branches that read the same x, their heads side by side in the given order.

    Args:
        branches: mixers, of which `Mixer.heads` is read.
    """

    unsplit = "it joins heads of branches of several kinds"

    def __init__(self, branches: Sequence[Mixer]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, call: Call) -> Tensor:
        return torch.cat([branch.heads(call) for branch in self.branches], dim=2)

    def members(self) -> Iterator[Stage]:
        yield self
        for branch in self.branches:
            yield from branch.stages()

    def work(self, length: int) -> Iterator[Work]:
        for branch in self.branches:
            yield from branch.work(length)

    def retain(self) -> Retain | None:
        """Branches with rows must agree; the others do not care."""
        kept = {
            branch.retain()
            for branch in self.branches
            if any(slot.kind == "rows" for slot in branch.memory().values())
        }
        assert len(kept) <= 1, f"branches retain {kept}"
        return kept.pop() if kept else None

    def choose(self, asked: str) -> Choices:
        """That of the first branch; each branch was asked for its own."""
        return self.branches[0].choices


class OwnAttention(Mixer):
    """A core with the slots that all frames share; see the module."""

    def __init__(self, *, core: Core, combine: list[Stage], out: Stage, after: list[Stage]) -> None:
        super().__init__(after)
        self.core, self.out = core, out
        self.combine = nn.ModuleList(sorted(combine, key=lambda s: s.rank))

    def heads(self, call: Call) -> Tensor:
        """``(B, T, H, d_v)``."""
        return combined(self.combine, self.core(call), call)

    def chain(self) -> Iterable[Stage]:
        return (self.core, *self.combine, self.out)

    def retain(self) -> Retain | None:
        return self.core.retain()
