"""KV shifting: each key head mixes its own and the previous token's key, each value head likewise.

KV Shifting Attention Enhances Language Modeling, arXiv 2411.19574.

    k^_t = alpha_1 k_t + alpha_2 k_(t-1),   v^_t = beta_1 v_t + beta_2 v_(t-1)     per key/value head
    z_(-1) = 0 at the start of a document;  RoPE on q_t and k^_t, at the position of t
    then gqa

One layer can then form an induction head. Start: alpha_1, beta_1 ~ U(0, 1), alpha_2 = 1 - alpha_1,
beta_2 = 1 - beta_1, free afterwards.
Cached: k^ (after RoPE) and v^, 2 G d per token, and the raw k, v of the last token: 2 G d per sequence. The
paper's decoding snippet keeps the mixed key instead, which is another, recursive filter. Our choice: the four
vectors are not decayed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.cards import Claim
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


class TokenShift(Stage):
    """Mixes keys, values or both with those of the token before, per head.

    Args:
        shapes: (heads, width) of those that are mixed, by "k" and "v". start: "uniform" or "identity".
    """

    rank = 10
    names = {"k": "alpha", "v": "beta"}  # noqa: RUF012

    def __init__(self, shapes: dict[str, tuple[int, int]], start: str) -> None:
        super().__init__()
        self.shapes = shapes
        for side, (heads, _) in shapes.items():
            own = torch.rand(heads) if start == "uniform" else torch.ones(heads)
            for i, value in enumerate((own, 1 - own), start=1):
                weight = flag(nn.Parameter(value), decay=False, reinit=False)
                self.register_parameter(f"{self.names[side]}{i}", weight)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        return q, self._mixed("k", k, call), self._mixed("v", v, call)

    def _mixed(self, side: str, z: Tensor, call: Call) -> Tensor:
        """``(B, G, T, d)``."""
        if side not in self.shapes:
            return z
        own, last = (getattr(self, f"{self.names[side]}{i}").to(z.dtype)[:, None, None] for i in (1, 2))
        before = call.mem.tail(f"shift_{side}", z.transpose(1, 2).flatten(2), 1)[:, :-1]  # (B, T, G d)
        if call.line.doc is not None:
            before = torch.where((call.line.order >= 1)[..., None], before, torch.zeros((), dtype=z.dtype))
        return own * z + last * before.unflatten(-1, self.shapes[side]).transpose(1, 2)

    def split(self, share: Share) -> None:
        for side, (heads, _) in self.shapes.items():
            for i in (1, 2):
                share.cut(self, f"{self.names[side]}{i}", (heads, 1))
        self.shapes = share.shapes(self.shapes)

    def memory(self) -> dict[str, Slot]:
        return {f"shift_{side}": Slot("tail", (1, heads * d)) for side, (heads, d) in self.shapes.items()}

    def elementwise(self) -> dict[str, float]:
        return {"token shift": 3.0 * sum(heads * d for heads, d in self.shapes.values())}


@register(
    Card(
        name="kv_shift",
        title="KV shifting attention",
        paper="KV Shifting Attention Enhances Language Modeling",
        arxiv="2411.19574",
        family="sharing",
        summary="Each head's keys and values are learned mixes of the token's own and the previous token's.",
        cached="k, v: 2 G d per token, and the last token's raw k, v",
        claims=(
            Claim("MMLU 37.26 -> 40.88, iGSM 0.8154 -> 0.8909", where="2.9B, 500B tokens"),
            Claim("better loss", "val_bpb", "lower", "mha", "1.5B to 19B"),
            Claim(
                "one layer learns induction, which a plain layer cannot",
                "accuracy:induction",
                "higher",
                "mha",
                "synthetic, one layer",
            ),
        ),
        small={"num_kv_heads": 2},
    ),
    frames=("score", "recurrent"),
)
def kv_shift(
    draft: Draft,
    *,
    shift_init: Literal["uniform", "identity"] = "uniform",
    shift_k: bool = True,
    shift_v: bool = True,
) -> None:
    """Adds the shift.

    Args:
        shift_init: alpha_1, beta_1 ~ U(0, 1), or no shift at the start.
        shift_k, shift_v: whether keys and values are mixed; one of them must be.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: the host with alpha = beta = (1, 0), where shift_init=identity starts.
    """
    if not (shift_k or shift_v):
        raise ValueError("shift_k: nothing is shifted, got shift_k=false and shift_v=false; set one of them")
    sides = "k" * shift_k + "v" * shift_v

    def early(done: Draft) -> None:
        if getattr(done.slots.get("project"), "late", False):
            raise ValueError(
                "add: the previous token's key and value do not exist before the cache of a latent "
                "projection, got kv_shift over one; leave kv_shift or the projection out"
            )

    def complete(done: Draft) -> None:
        if done.borrows:  # what is borrowed was shifted by the layer that made it
            return
        shapes = done.shapes(projected=True)
        done.put("refine", TokenShift({side: shapes[side] for side in sides}, shift_init))

    draft.last(complete)
    draft.very_last(early)
