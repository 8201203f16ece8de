"""One forward of one layer, as its stages see it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo.attention.memory import Memory
from attnzoo.attention.site import Site
from attnzoo.attention.slots import Cache
from attnzoo.attention.timeline import Axis, Timeline
from attnzoo.context import Context
from attnzoo.parallel.tensor import Share


class Raw(NamedTuple):
    """Queries, keys and values ``(B, heads, T, d)`` before position; an absorbed read makes no k and v."""

    q: Tensor
    k: Tensor | None
    v: Tensor | None


class Call:
    """One forward of one layer: the last argument of every stage.

    Attributes:
        x: ``(B, T, D)`` input, padding at the right and zero.
        residual: ``(B, T, D)`` the un-normalised stream (``x`` where the caller gave none).
        line: documents and positions of this forward; ``mem``: the layer's memory; ``shared``: the Context's
            dict.
        impl: what ops beside scores are asked for: "auto", "reference" or "triton".
        share: the rank's share of the heads while it computes them, where ranks share heads.
        raw: q, k, v before position, once the projection has run.
        notes: what a stage hands to a later one of the same forward, by name.
    """

    def __init__(
        self, site: Site, x: Tensor, ctx: Context, line: Timeline, cache: Cache | None, impl: str = "auto"
    ) -> None:
        self.site, self.line, self.ctx, self.impl = site, line, ctx, impl
        self.shared = ctx.shared
        own = ctx.timeline is None
        self.x = line.compact(x) if own else x
        self.mem = Memory(line, cache)
        self.raw: Raw | None = None
        self.notes: dict[str, Any] = {}
        self.share: Share | None = None

    @property
    def residual(self) -> Tensor:
        if self.ctx.residual is None:
            return self.x
        z = self.line.compact(self.ctx.residual) if self.ctx.timeline is None else self.ctx.residual
        return z if self.share is None else self.share.enter(z)

    @property
    def query(self) -> Axis:
        """Order and document of this forward's tokens."""
        return Axis(self.line.order, self.line.doc)

    @property
    def collects(self) -> bool:
        return self.ctx.collector is not None

    def aux(self, name: str, loss: Tensor, weight: float) -> None:
        """Reports an auxiliary loss (a scalar, not yet weighted) of this layer."""
        if self.ctx.collector is not None:
            loss = loss if self.share is None else self.share.once(loss)
            self.ctx.collector.loss(name, self.site, loss, weight)

    def stat(self, name: str, value: Tensor) -> None:
        """Reports a diagnostic; ``(B, T, ...)`` values come out in the caller's order, zero at padding."""
        if self.ctx.collector is not None:
            per_token = value.shape[:2] == self.x.shape[:2]
            self.ctx.collector.stat(name, self.site, self.line.restore(value) if per_token else value)

    def step(self, name: str, value: Tensor) -> None:
        """Reports a statistic of this forward that `Stage.on_step` gets after the optimiser's step."""
        if self.ctx.collector is not None:
            self.ctx.collector.step(name, self.site, value)

    def mean_over_tokens(self, z: Tensor) -> Tensor:
        """Mean of ``z`` ``(B, T, ...)`` over the tokens that are not padding, those of all parts."""
        valid, whole = self.line.valid, self.line.whole is None
        if valid is None and whole:
            return z.flatten(0, 1).mean(0)
        if valid is None:
            valid = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
        weight = valid.to(z.dtype).reshape(*valid.shape, *(1,) * (z.dim() - 2))
        total = self.mem.total((z * weight).flatten(0, 1).sum(0))
        return total / self.mem.total(weight.sum()).clamp(min=1)
