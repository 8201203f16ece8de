"""Knocking-heads attention: one small map, the same for all heads, after the per-head projections.

Knocking-Heads Attention, arXiv 2510.23052.

    linear: q~_h = q_h T_Q,  k~_h = k_h T_K,  v~_h = v_h T_V          T shared, identity at the start
    mlp:    v~_h = 2 [(v_h W_up) * sigmoid(v_h W_gate)] W_down         the identity at the start
    gate:   v~_h = 2 v_h * sigmoid(v_h W_gate)                         the paper's negative ablation
    then qk-norm, RoPE and attention as in the host.

Cached: as the host, from the mapped k and v. Our choice: the shared maps are not decayed (decay pulls them to
0, not to the identity) unless ``decay_shared``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.site import flag
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register

TARGETS = ("q", "k", "v")


class SharedHeadMap(Stage):
    """``z_h T`` for chosen ones of q, k, v, with one T for all heads of each.

    Args:
        shapes: (heads, width) of q, k, v. kind: "linear", "mlp", "gate"; targets: which of q, k, v.
    """

    rank = 20

    def __init__(
        self, shapes: dict[str, tuple[int, int]], kind: str, targets: tuple[str, ...], decay: bool
    ) -> None:
        super().__init__()
        self.shapes, self.kind, self.targets, self.sides = shapes, kind, targets, "".join(targets)
        parts = {"linear": ("T",), "mlp": ("up", "gate", "down"), "gate": ("gate",)}[kind]
        for target in targets:
            width = shapes[target][1]
            for part in parts:
                start = torch.zeros(width, width) if part == "gate" else torch.eye(width)
                self.register_parameter(
                    f"{part}_{target}", flag(nn.Parameter(start), decay=decay, reinit=False)
                )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(
            self._map(t, z) if t in self.targets else z for t, z in zip(TARGETS, (q, k, v), strict=True)
        )

    def _map(self, target: str, z: Tensor) -> Tensor:
        if self.kind == "linear":
            return z @ self._part("T", target)
        gate = 2 * torch.sigmoid(z @ self._part("gate", target))
        if self.kind == "gate":
            return z * gate
        return (z @ self._part("up", target) * gate) @ self._part("down", target)

    def split(self, share: Share) -> None:
        self.shapes = share.shapes(self.shapes)
        share.keep(self)

    def _part(self, name: str, target: str) -> Tensor:
        return getattr(self, f"{name}_{target}")

    def work(self, length: int) -> Iterable[Work]:
        maps = {"linear": 1, "mlp": 3, "gate": 1}[self.kind]
        for target in self.targets:
            heads, width = self.shapes[target]
            flops = 2 * maps * length * heads * width * width
            yield Work("projections", f"shared map of {target}", flops, per_head=target == "q")


@register(
    Card(
        name="kha",
        title="Knocking-heads attention",
        paper="Knocking-Heads Attention",
        arxiv="2510.23052",
        family="heads",
        summary="One small map, shared by all heads, on q, k or v after the per-head projections.",
        cached="as the host: 2 G d per token",
        claims=(
            Claim(
                "loss 1.856 -> 1.832 (mlp on v), 1.838 (linear)",
                "val_bpb",
                "lower",
                "mha",
                "MoE of 6.6B, 0.8B active, 32 heads on 4, 75B tokens",
            ),
            Claim("loss 2.017 -> 2.013 (mlp on v), 2.007 (linear)", "val_bpb", "lower", "mha", "dense 0.61B"),
        ),
    ),
    frames=("score", "recurrent"),
)
def kha(
    draft: Draft,
    *,
    kind: Literal["linear", "mlp", "gate"] = "mlp",
    targets: tuple[str, ...] | None = None,
    decay_shared: bool = False,
) -> None:
    """Adds the shared map.

    Args:
        kind: form of the map; "mlp" and "gate" are the paper's for values.
        targets: of q, k, v; default all for "linear", v otherwise.
        decay_shared: whether weight decay touches the maps.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: the host at the start of training; the host with folded weights in the linear form.
    """
    chosen = (TARGETS if kind == "linear" else ("v",)) if targets is None else targets
    if not chosen or set(chosen) - set(TARGETS) or len(set(chosen)) < len(chosen):
        raise ValueError(f"targets: must be some of q, k, v, each once, got {list(chosen)}")

    def complete(done: Draft) -> None:
        if kind != "linear" and getattr(done.slots.get("project"), "late", False):
            raise ValueError(
                f"kind: a latent projection caches no values, only linear fits, got {kind!r}; set kind=linear"
            )
        # borrowed keys and values were mapped by the layer that made them
        own = tuple(t for t in chosen if t == "q") if done.borrows else chosen
        if own:
            done.put("refine", SharedHeadMap(done.shapes(projected=True), kind, own, decay_shared))

    draft.last(complete)
