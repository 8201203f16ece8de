"""Multiple-head-embedding attention: one projection for all heads, which differ by a vector each.

Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head Attention,
arXiv 2310.07911.

    q0, k0, v0 = x W_q, x W_k, x W_v, each d wide
    psi_add(a, e) = a + e,   psi_mul(a, e) = a * (1 + e)
    q_h = psi(q0, e_q,h), likewise k_h and v_h;  RoPE on q_h and k_h;  y = concat_h(attend(q_h, k_h, v_h)) W_o
    mul, no RoPE:  q_h . k_h = (q0 * (1 + e_q,h) * (1 + e_k,h)) . k0,  o_h = (sum p v0) * (1 + e_v,h): mqa
    add, RoPE:     e_k is a position bias q_i . R_(j-i) e_k,h,         o_h = sum p v0 + e_v,h
    add, no RoPE:  q_h . e_k,h is the same for all keys and cancels in the softmax: e_k has no gradient

Cached: k0 and v0, 2 d per token for all heads. ``pairwise_scale`` ties e_q and e_k inside each rotary pair:
scale and rotation then commute, and mul folds with RoPE as it does without. k0 is cached after RoPE where it
folds or adds, before it where each head scales it at read, or where another stage acts on keys or weights.
Our choice: mul by default, e from N(0, 0.02²).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.score import Late
from attnzoo.attention.site import INIT_STD, flag
from attnzoo.attention.slots import Slot
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.ops.attention import Keys
from attnzoo.ops.fused import split_linear
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


class SharedHead(Late, Stage):
    """Late projection from rows ``k0`` and ``v0`` of one head.

    Args:
        kind: "mul" or "add"; pairwise: e_q and e_k tied inside rotary pairs. `fold` says what may be folded.
    """

    def __init__(self, draft: Draft, kind: str, pairwise: bool) -> None:
        super().__init__()
        self.dim, self.heads, self.width = draft.dim, draft.num_heads, draft.head_dim
        self.kind, self.pairwise, self.turned, self.folds = kind, pairwise, (), False
        self.sizes = [self.width] * 3
        self.qkv_proj = draft.site.weights.linear(
            "qkv", self.dim, 3 * self.width, draft.host["qkv_bias"], parts=self.sizes
        )
        tied = self.width // 2 if pairwise else self.width
        for name, width in (("e_q", tied), ("e_k", tied), ("e_v", self.width)):
            start = torch.randn(self.heads, width) * INIT_STD
            self.register_parameter(name, flag(nn.Parameter(start), decay=False, reinit=False))

    def fold(self, rope: bool, whole: bool) -> None:
        """Decides what is cached and where heads come to exist.

        Args:
            rope: whether keys are rotated; whole: nothing but softmax and position acts on keys and weights.
        """
        commutes = self.kind == "add" or self.pairwise or not rope
        self.folds = whole and commutes
        self.turned = ("k0",) if self.folds and rope else ()

    def rows(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """q ``(B, H, T, d)`` twice, and the rows ``(B, 1, T, d)``."""
        q, k, v = (z[:, None] for z in split_linear(self.qkv_proj, x, self.sizes))
        q = self._per_head(q, self.e_q)
        return q, q, {"k0": k, "v0": v}

    def keys(self, rows: dict[str, Tensor], call: Call) -> tuple[Tensor, Tensor]:
        """Keys and values ``(B, H, S, d)`` of each head, keys before RoPE."""
        return self._per_head(rows["k0"], self.e_k), self._per_head(rows["v0"], self.e_v)

    def _per_head(self, z: Tensor, e: Tensor) -> Tensor:
        e = self._whole(e, z)[:, None]
        return z + e if self.kind == "add" else z * (1 + e)

    def _whole(self, e: Tensor, like: Tensor) -> Tensor:
        """``(H, d)`` in the dtype of ``like``; the two halves of a head are its rotary pairs."""
        e = e.to(like.dtype)
        return torch.cat([e, e], dim=-1) if e.shape[-1] < self.width else e

    def absorbs(self, new: int, keys: int) -> bool:
        return self.folds

    def absorbed(self, q: Tensor, q_rot: Tensor, rows: dict[str, Tensor], turn: Callable):
        """Queries of each head against what is cached, and the head vectors of values on the sums."""
        q, k, v = q_rot if self.turned else q, rows["k0"], rows["v0"]
        e_k, e_v = self._whole(self.e_k, k), self._whole(self.e_v, v)
        if self.kind == "mul":
            return q * (1 + e_k)[:, None], Keys(k, v), lambda o: o * (1 + e_v)
        if self.turned:
            k = k + turn(e_k[None, :, None].expand(1, -1, k.shape[2], -1))
        return q, Keys(k, v), lambda o: o + e_v

    def split(self, share: Share) -> None:
        for name in ("e_q", "e_k", "e_v"):
            share.cut(self, name, (self.heads, 1))
        share.keep(self)
        self.heads = share.count(self.heads)

    def memory(self) -> dict[str, Slot]:
        return {name: Slot("rows", (1, self.width)) for name in ("k0", "v0")}

    def work(self, length: int) -> Iterable[Work]:
        yield Work("projections", "W_q, W_k, W_v", 2 * length * self.dim * sum(self.sizes))

    def elementwise(self) -> dict[str, float]:
        return {"head vectors": 3.0 * self.heads * self.width}


@register(
    Card(
        name="mhe",
        title="Multiple-head-embedding attention",
        paper="Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient "
        "Multi-head Attention",
        arxiv="2310.07911",
        family="factorised",
        summary="One query, key and value projection for all heads, which add or multiply a vector each.",
        cached="the shared key and value: 2 d per token",
        claims=(
            Claim(
                "3 H d parameters more than a single head, against (3 H² - 3 H) d² + 3 H d of mha",
                "params",
                "lower",
                "mha",
            ),
        ),
    ),
    fixed={"num_kv_heads": "all heads share one key and value projection"},
)
def mhe(draft: Draft, *, mhe_kind: Literal["add", "mul"] = "mul", pairwise_scale: bool = False) -> None:
    """Sets the projection.

    Args:
        mhe_kind: what a head does with its vectors. With "add" and pos=none e_k has no gradient.
        pairwise_scale: e_q and e_k scale both channels of a rotary pair alike ("mul" only).

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mqa with W_q copied to all heads where every e is 0.
    """
    if pairwise_scale and mhe_kind == "add":
        raise ValueError(
            "pairwise_scale: ties the factors of mhe_kind=mul, got true with mhe_kind=add; set it to false"
        )
    if pairwise_scale and draft.head_dim % 2:
        raise ValueError(
            f"pairwise_scale: pairs of channels need an even head_dim, got true with {draft.head_dim}"
        )
    shape = (draft.num_heads, draft.num_heads, draft.head_dim, draft.head_dim)
    project = SharedHead(draft, mhe_kind, pairwise_scale)
    draft.put("project", project)

    def settled(done: Draft) -> None:
        if (done.num_heads, done.num_kv_heads, done.head_dim, done.v_head_dim) != shape:
            raise ValueError(
                f"num_kv_heads: all heads share one key and value, got {done.num_kv_heads} by add; "
                "leave one out"
            )
        # add folds by weights that sum to 1 over the keys, which only the plain softmax promises
        acting = {"score", "read", *({"normalise"} if mhe_kind == "add" else ())}
        whole = not (acting & done.slots.keys() or done.slots["refine"] or done.host["qk_norm"])
        ours = "position" not in done.slots
        project.fold(done.host["pos"] == "rope", whole and ours)

    # once more, so that all other variants have put their stages
    draft.very_last(settled)
