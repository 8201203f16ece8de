"""What travels beside the hidden states: documents, positions, the residual stream, losses, diagnostics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attnzoo.attention.site import Site
    from attnzoo.attention.timeline import Timeline
    from attnzoo.parallel.context import Span


class Collector:
    """Gathers auxiliary losses and diagnostics of one forward pass.

    Attributes:
        losses: ``name -> {layer: (unweighted scalar loss, recommended weight)}``.
        stats: ``name -> {layer: detached tensor}``.
        steps: the same, of what layers want to hear again after the optimiser's step (`Stage.on_step`).

    Entries are keyed, so a recomputed forward (activation checkpointing) overwrites its own.
    """

    def __init__(self) -> None:
        self._losses: dict[str, dict[int, tuple[Tensor, float]]] = {}
        self._stats: dict[str, dict[int, Tensor]] = {}
        self._steps: dict[str, dict[int, Tensor]] = {}
        self._heard: list[tuple[dict, str, Site, Any]] = []

    def loss(self, name: str, site: Site, value: Tensor, weight: float) -> None:
        self._heard.append((self._losses, name, site, (value, weight)))

    def stat(self, name: str, site: Site, value: Tensor) -> None:
        self._heard.append((self._stats, name, site, value.detach()))

    def step(self, name: str, site: Site, value: Tensor) -> None:
        self._heard.append((self._steps, name, site, value.detach()))

    def settle(self) -> None:
        """Sort in what was reported; between layers, so that all find the same and share compiled code."""
        for known, name, site, value in self._heard:
            known.setdefault(name, {})[site.layer] = value
        self._heard.clear()

    @property
    def losses(self) -> dict[str, dict[int, tuple[Tensor, float]]]:
        self.settle()
        return self._losses

    @property
    def stats(self) -> dict[str, dict[int, Tensor]]:
        self.settle()
        return self._stats

    @property
    def steps(self) -> dict[str, dict[int, Tensor]]:
        self.settle()
        return self._steps

    def total(self, weights: Mapping[str, float] | None = None) -> Tensor:
        """Sum over loss names of ``weight * mean over layers``.

        Args:
            weights: overrides the recommended weight of the losses it names.

        Raises:
            ValueError: ``weights`` names a loss that no layer reported.
        """
        unknown = sorted(set(weights or {}) - set(self.losses))
        if unknown:
            raise ValueError(
                f"aux weights: no layer reports {unknown}; reported: {sorted(self.losses) or 'none'}"
            )
        total = torch.zeros(())
        for name, layers in self.losses.items():
            values = [value for value, _ in layers.values()]
            weight = (weights or {}).get(name, next(iter(layers.values()))[1])
            total = total.to(values[0].device) + weight * torch.stack(values).mean()
        return total


@dataclass
class Context:
    """Everything a mixer may be told besides ``x``.

    Args:
        positions: ``(B, T)`` positions of the tokens; by default counted within each document and on from the
            cache. Only position stages (RoPE ...) read them: order and causality follow the token order.
        segment_ids: ``(B, T)`` integers, 0 = padding, n > 0 = document n. A change of id starts a document.
            With a cache they go on per row: the id of the last cached token continues its document.
        residual: ``(B, T, D)`` the un-normalised stream, for variants that need it; missing means ``x``.
        shared: tensors that cross layers, keyed by the symbol of the paper.
        collector: where auxiliary losses and diagnostics go; without one they are not computed.
        span: the part of every sequence that this rank holds, for a model: it takes the whole sequences with
            their ``positions`` and ``segment_ids`` and returns the logits of its own tokens. Keyword only.
    """

    positions: Tensor | None = None
    segment_ids: Tensor | None = None
    residual: Tensor | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    collector: Collector | None = None
    span: Span | None = field(default=None, repr=False, kw_only=True)
    # set by the model only, so that its layers share one reading of documents and positions
    timeline: Timeline | None = field(default=None, repr=False, kw_only=True)

    def at(self, residual: Tensor, timeline: Timeline) -> Context:
        """This context as one layer of a model sees it."""
        return replace(self, residual=residual, timeline=timeline)
