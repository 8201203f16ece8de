"""Multi-matrix factorisation attention: one wide key/value head, many wide query heads from a factorised W_q.

Multi-matrix Factorization Attention, arXiv 2412.19255; Step-3, arXiv 2507.19427.

    c_q = RMSNorm(x S_q),  q = c_q Q  (m heads of width C),  k = x S_k,  v = x S_v  (one head of width C)
    o_h = sum_(j <= i) softmax_j(q_h,i . k_j / sqrt(C)) v_j,  RoPE on q and k
    y   = concat_h(o) W_o,  or with out_factor "shared"  y = (sum_h o_h O_h) S_o
    mfa_kr ("key reuse"): v = k + alpha * (k N^T) with k before RoPE, alpha one gate per output channel, 0 at
           the start; read as z = sum_j p_j k_j, o = z + alpha * (z N^T): the sum first, then the mix

Cached: mfa k (after RoPE) and v, 2 C per token; mfa_kr k before RoPE, C per token, turned when it is read. It
sums first where that needs fewer FLOPs (decode). Our choice: C = 2 D / H, since the head is meant to be wide;
r_q = min(C, D), where the paper has r_q = C (Step-3 more). "full" is Step-3's output matrix, "shared" the
paper's, which limits the rank of the output to C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.score import Early, Late
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.ops.attention import Keys
from attnzoo.ops.fused import rms_norm
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


class FactorisedQ(Stage):
    """Queries through a rank-r_q bottleneck: ``RMSNorm(x S_q) Q``.

    Args:
        width: C; rank: r_q; norm: RMSNorm in the bottleneck; bias: of Q; copies: 2 for k and v, 1 for k.
    """

    def __init__(
        self, draft: Draft, width: int, rank: int, norm: bool, bias: bool, eps: float, copies: int
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.width, self.rank, self.eps = draft.dim, draft.num_heads, width, rank, eps
        self.copies = copies
        self.q_down = draft.linear("q_down", draft.dim, rank)
        self.gain = flag(nn.Parameter(torch.ones(rank)), decay=False) if norm else None
        self.q_up = draft.linear("q_up", rank, self.heads * width, bias)
        parts = [width] * copies
        self.kv_proj = draft.site.weights.linear("kv", draft.dim, copies * width, bias, parts=parts)

    def queries(self, x: Tensor) -> Tensor:
        """``(B, H, T, C)``."""
        c = self.q_down(x)
        c = c if self.gain is None else rms_norm(c, self.gain, self.eps)
        return self.q_up(c).unflatten(-1, (self.heads, self.width)).transpose(1, 2)

    def split(self, share: Share) -> None:
        share.rows(self.q_up, (self.heads, self.width))
        self.heads = share.count(self.heads)
        share.keep(self)

    def work(self, length: int) -> Iterable[Work]:
        per = 2 * length
        yield Work("projections", "S_q", per * self.dim * self.rank)
        yield Work("projections", "Q", per * self.rank * self.heads * self.width, per_head=True)
        yield Work("projections", "S_k, S_v", per * self.dim * self.copies * self.width)


class OneHead(Early, FactorisedQ):
    """Projection of mfa: key and value of their own."""

    split = FactorisedQ.split

    def qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.kv_proj(x)[:, None].split([self.width] * 2, dim=-1)
        return self.queries(x), k, v

    def memory(self) -> dict[str, Slot]:
        return {name: Slot("rows", (1, self.width)) for name in ("k", "v")}


class KeyReuse(Late, FactorisedQ):
    """Projection of mfa_kr: the key before position is cached, and the value made from it."""

    def __init__(self, draft: Draft, *args) -> None:
        super().__init__(draft, *args)
        self.mix = draft.linear("value_mix", self.width, self.width)
        self.alpha = flag(nn.Parameter(torch.zeros(self.width)), decay=False)

    split = FactorisedQ.split

    def rows(self, x: Tensor, call: Call) -> tuple[Tensor, None, dict[str, Tensor]]:
        return self.queries(x), None, {"key": self.kv_proj(x)[:, None]}

    def mixed(self, z: Tensor) -> Tensor:
        """The value that goes with a key, or with a sum of keys: linear in it."""
        return z + (self.alpha * self.mix(z)).to(z.dtype)

    def keys(self, rows: dict[str, Tensor], call: Call) -> tuple[Tensor, Tensor]:
        return rows["key"], self.mixed(rows["key"])

    def absorbs(self, new: int, keys: int) -> bool:
        return new * self.heads < keys

    def absorbed(self, q: Tensor, q_rot: None, rows: dict[str, Tensor], turn: Callable):
        """Values are the keys themselves; what the heads have summed is mixed."""
        return q, Keys(turn(rows["key"]), rows["key"]), self.mixed

    def memory(self) -> dict[str, Slot]:
        return {"key": Slot("rows", (1, self.width))}

    def work(self, length: int) -> Iterable[Work]:
        yield from super().work(length)
        yield Work("projections", "N", 2 * length * self.width**2)


class SharedOut(Stage):
    """``(sum_h o_h O_h) S_o``: one C x C matrix per head, one C x D matrix for all."""

    def __init__(self, draft: Draft, num_heads: int, width: int, bias: bool) -> None:
        super().__init__()
        self.num_heads, self.width, self.dim = num_heads, width, draft.dim
        self.share: Share | None = None
        self.per_head = draft.linear("out_heads", num_heads * width, width)
        self.out_proj = draft.site.weights.linear("out", width, draft.dim, bias, std=draft.site.out_std)

    def forward(self, o: Tensor, call: Call) -> Tensor:
        z = self.per_head(o.flatten(2))
        if self.share is None:
            return self.out_proj(z)
        return F.linear(z, self.out_proj.weight, self.share.bias(self.out_proj))

    def split(self, share: Share) -> None:
        share.columns(self.per_head, self.num_heads, self.width)
        share.keep(self)
        self.num_heads, self.share = share.count(self.num_heads), share

    def work(self, length: int) -> Iterable[Work]:
        yield Work("projections", "O_h", 2 * length * self.num_heads * self.width**2, per_head=True)
        yield Work("projections", "S_o", 2 * length * self.width * self.dim)


def _factorised(
    draft: Draft, q_rank: int | None, q_norm: bool, out_factor: str, stage: type[FactorisedQ], copies: int
) -> None:
    host = draft.host
    if host["head_dim"] is None:
        draft.head_dim = draft.v_head_dim = 2 * draft.dim // draft.num_heads
    width = draft.head_dim
    rank = min(width, draft.dim) if q_rank is None else q_rank
    if not 1 <= rank <= draft.dim:
        raise ValueError(f"q_rank: must be in 1..dim={draft.dim}, got {rank}; a bottleneck cannot be wider")

    def complete(done: Draft) -> None:
        if done.num_kv_heads != 1:
            raise ValueError(
                f"num_kv_heads: there is one wide key/value head, got {done.num_kv_heads} by add; "
                "leave one out"
            )
        if out_factor == "shared":
            done.put("out", SharedOut(done, done.o_heads, done.v_head_dim, host["out_bias"]))

    draft.put("project", stage(draft, width, rank, q_norm, host["qkv_bias"], host["norm_eps"], copies))
    draft.last(complete)


ONE = {"num_kv_heads": "all query heads share one wide key/value head; use gqa for several"}
SMALL = {"head_dim": 12, "q_rank": 10, "out_factor": "shared"}


@register(
    Card(
        name="mfa",
        title="Multi-matrix factorisation attention",
        paper="Multi-matrix Factorization Attention",
        arxiv="2412.19255",
        family="latent",
        summary="One wide key/value head; wide query heads come from one low-rank factorisation.",
        cached="one k and one v: 2 C per token",
        claims=(
            Claim("accuracy 49.9 (mha 49.0, mla 48.3)", where="7B MoE, 1T tokens"),
            Claim("24.6 KB per token, mha 196.6", "cache_bytes", "lower", "mha", "7B MoE, 1T tokens"),
        ),
        small=SMALL,
    ),
    host={"num_kv_heads": 1},
    fixed=ONE,
)
def mfa(
    draft: Draft,
    *,
    q_rank: int | None = None,
    q_norm: bool = True,
    out_factor: Literal["full", "shared"] = "full",
) -> None:
    """Sets the projection, and the output where it is factorised.

    Args:
        q_rank: r_q of 1..D; default min(C, D). q_norm: RMSNorm in the bottleneck.
        out_factor: "full" W_o, or "shared": C x C per head and one C x D matrix.
        (head_dim: C; default 2 D / H.)

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mqa with S_q Q = W_q and no norm; "full" with W_o,h = O_h S_o.
    """
    _factorised(draft, q_rank, q_norm, out_factor, OneHead, 2)


@register(
    Card(
        name="mfa_kr",
        title="Multi-matrix factorisation attention with key reuse",
        paper="Multi-matrix Factorization Attention",
        arxiv="2412.19255",
        family="latent",
        summary="mfa whose values are its keys plus a gated map of them.",
        cached="one k before position: C per token",
        claims=(
            Claim("accuracy 48.0 (mha 49.0)", where="7B MoE, 1T tokens"),
            Claim("12.3 KB per token, mha 196.6", "cache_bytes", "lower", "mha", "7B MoE, 1T tokens"),
            Claim("12.3 KB per token, mfa 24.6", "cache_bytes", "lower", "mfa", "7B MoE, 1T tokens"),
        ),
        small=SMALL,
    ),
    host={"num_kv_heads": 1},
    fixed=ONE,
)
def mfa_kr(
    draft: Draft,
    *,
    q_rank: int | None = None,
    q_norm: bool = True,
    out_factor: Literal["full", "shared"] = "full",
) -> None:
    """Sets the projection, and the output where it is factorised.

    Args:
        q_rank: r_q of 1..D; default min(C, D). q_norm: RMSNorm in the bottleneck.
        out_factor: "full" W_o, or "shared": C x C per head and one C x D matrix.
        (head_dim: C; default 2 D / H.)

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mfa with S_v = S_k + S_k N^T diag(alpha); its own sum-first form.
    """
    _factorised(draft, q_rank, q_norm, out_factor, KeyReuse, 1)
