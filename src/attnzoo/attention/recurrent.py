"""RecurrentAttention: project -> refine -> position -> gates -> scan -> combine -> out -> after.

The same project, refine, position, combine and out stages as `ScoreAttention`; the middle is a state
recurrence. Ranks as there; combine 10 is the denominator, where a variant has one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Choices, Mixer, Stage
from attnzoo.attention.call import Call, Raw
from attnzoo.attention.implementation import choose_scan
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.combine import combined
from attnzoo.cost import Work
from attnzoo.ops.scan import scan
from attnzoo.parallel.tensor import Share
from attnzoo_kernels.scan import scan_flops


class Terms(NamedTuple):
    """What a scan runs on: q, k, a, e ``(B, T, H, d_k)``, v ``(B, T, H, d_v)``, log decay g ``(B, T, H)``,
    ``(B, T, H, d_k)`` or ``(H,)``, beta ``(B, T, H)``; see `attnzoo_kernels.scan`."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    beta: Tensor | None = None
    e: Tensor | None = None
    a: Tensor | None = None


def scanned(terms: Terms, slot: str, call: Call, scale: float, chunk_size: int) -> Tensor:
    """``(B, T, H, d_v)`` what the recurrence reads, on from the state ``slot``, which it leaves behind."""
    o, state = scan(
        *terms,
        scale=scale,
        initial_state=call.mem.state(slot),
        output_final_state=not call.mem.alone,
        chunk_size=chunk_size,
        segments=call.line.doc,
        impl=call.impl,
    )
    call.mem.put(slot, state)
    return o


class NoGates(Stage):
    """Nothing is forgotten, everything is written."""

    kind = "scalar"
    alike = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Terms:
        return Terms(q, k, v)


class Scan(Stage):
    """The recurrence itself, with its state ``S`` ``(H, d_k, d_v)``.

    Args:
        groups: heads of queries and keys that states share, where their products are made before the gates
            tell the states apart; None = each state has its own.
    """

    def __init__(
        self,
        heads: int,
        k_width: int,
        v_width: int,
        chunk_size: int,
        scale: float,
        kind: str,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        if chunk_size < 1:
            raise ValueError(f"chunk_size: must be at least 1, got {chunk_size}")
        self.shape, self.chunk_size, self.scale = (heads, k_width, v_width), chunk_size, scale
        self.kind, self.groups = kind, groups

    def memory(self) -> dict[str, Slot]:
        return {"S": Slot("state", self.shape)}

    def choose(self, asked: str) -> Choices:
        """The implementation for the option ``impl``; see `choose_scan`. Other stages of the slot have it."""
        return choose_scan(asked, self.shape[1])

    def split(self, share: Share) -> None:
        self.shape = (share.count(self.shape[0]), *self.shape[1:])
        self.groups = self.groups and share.count(self.groups)

    def forward(self, terms: Terms, call: Call) -> Tensor:
        return scanned(terms, "S", call, self.scale, self.chunk_size)

    def work(self, length: int) -> Iterable[Work]:
        heads, k_width, v_width = self.shape
        flops = scan_flops(self.kind, length, heads, k_width, v_width, self.chunk_size, self.groups)
        why = "later tokens of a chunk" + (", scores that states share" if self.groups else "")
        yield Work("mixing", "scan", *flops, why, per_head=True)


class RecurrentAttention(Mixer):
    """Attention by a recurrent state; see the module. Slots: project, refine, position, gates, scan,
    combine, out, after.
    """

    def __init__(
        self,
        *,
        project: Stage,
        refine: list[Stage],
        position: Stage,
        gates: Stage,
        scan: Stage,
        combine: list[Stage],
        out: Stage,
        after: list[Stage],
    ) -> None:
        super().__init__(after)
        self.project, self.position, self.gates, self.scan, self.out = project, position, gates, scan, out
        self.refine = nn.ModuleList(sorted(refine, key=lambda s: s.rank))
        self.combine = nn.ModuleList(sorted(combine, key=lambda s: s.rank))

    def heads(self, call: Call) -> Tensor:
        """``(B, T, H, d_v)``."""
        q, k, v = self.project.qkv(call.x, call)
        for stage in self.refine:
            q, k, v = stage(q, k, v, call)
        call.raw = Raw(q, k, v)
        q, k = self.position(q, k, call)
        terms = self.gates(*(_per_state(z, self.scan.shape[0]).transpose(1, 2) for z in (q, k, v)), call)
        o = self.scan(_without_padding(terms, call), call)
        return combined(self.combine, o, call)

    def chain(self) -> Iterable[Stage]:
        return (self.project, *self.refine, self.position, self.gates, self.scan, *self.combine, self.out)


def _per_state(z: Tensor, heads: int) -> Tensor:
    """One head per state; consecutive states share."""
    return z if z.shape[1] == heads else z.repeat_interleave(heads // z.shape[1], dim=1)


def _without_padding(terms: Terms, call: Call) -> Terms:
    """Padding writes nothing and forgets nothing."""
    valid = call.line.valid
    if valid is None:
        return terms

    def blank(name: str, z: Tensor | None) -> Tensor | None:
        if z is None or name == "q" or z.dim() == 1:
            return z
        return torch.where(
            valid.reshape(*valid.shape, *(1,) * (z.dim() - 2)), z, torch.zeros((), dtype=z.dtype)
        )

    if terms.g is not None and terms.g.dim() == 1:
        terms = terms._replace(g=terms.g.expand(*valid.shape, -1))
    return Terms(*(blank(name, z) for name, z in zip(Terms._fields, terms, strict=True)))
