"""Multi-head latent attention: keys and values come from one cached latent and one shared rotary key.

DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437.

    c_q = RMSNorm(x W_dq)  (or x),  [q_n,h ; q_r,h] = c_q W_uq
    [c_0 ; k_r] = x W_dkv,  c = RMSNorm(c_0),  RoPE on q_r and on k_r (one head, not normed)
    [k_n,h ; v_h] = c W_ukv
    s_ij,h = (q_n,h . k_n,h + q_r,h . k_r) / sqrt(d_n + d_r),  y = concat_h(sum_j softmax_j(s) v_h) W_o
    absorbed: q~_h = q_n,h U_K,h^T against c itself, o_h = (sum_j p_j c_j) U_V,h: one key head, d_c + d_r wide

Cached: c after its norm and k_r after RoPE, d_c + d_r per token. The absorbed form runs where it needs fewer
FLOPs (decode), the materialised one elsewhere. Our choice: default widths d_n = d_v = D / H, d_r half of it
(even), d_c = min(4, H) D / H, no query latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Call, Stage, flag
from attnzoo.attention.draft import Draft
from attnzoo.attention.memory import Slot
from attnzoo.attention.score import Late
from attnzoo.cost import Work
from attnzoo.ops.attention import Keys
from attnzoo.ops.fused import rms_norm
from attnzoo.registry import Card, register


class Latent(Late, Stage):
    """Late projection from rows ``latent`` (1, d_c) and ``k_rope`` (1, d_r).

    Args:
        widths: d_n, d_r, d_v; rank: d_c; q_rank: r_q, 0 = queries straight from x; norm: RMSNorm on the
            latents.
    """

    def __init__(
        self, draft: Draft, widths: tuple[int, int, int], rank: int, q_rank: int, norm: bool, eps: float
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.widths, self.rank, self.q_rank, self.eps = (
            draft.dim,
            draft.num_heads,
            widths,
            rank,
            q_rank,
            eps,
        )
        d_n, d_r, d_v = widths
        self.turned = ("k_rope",) if d_r else ()
        q_in = q_rank or draft.dim
        if q_rank:
            self.q_down = draft.linear("q_down", draft.dim, q_rank)
            self.q_gain = flag(nn.Parameter(torch.ones(q_rank)), decay=False) if norm else None
        self.q_up = draft.linear("q_up", q_in, self.heads * (d_n + d_r))
        self.kv_down = draft.linear("kv_down", draft.dim, rank + d_r)
        self.kv_gain = flag(nn.Parameter(torch.ones(rank)), decay=False) if norm else None
        self.kv_up = draft.linear("kv_up", rank, self.heads * (d_n + d_v))

    def rows(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """q ``(B, H, T, d_n)``, its rotary part ``(B, H, T, d_r)``, and the rows to cache."""
        d_n, d_r, _ = self.widths
        c_q = self._normed(self.q_down(x), self.q_gain) if self.q_rank else x
        q, q_rot = (
            self.q_up(c_q).unflatten(-1, (self.heads, d_n + d_r)).transpose(1, 2).split([d_n, d_r], dim=-1)
        )
        c, k_rot = self.kv_down(x)[:, None].split([self.rank, d_r], dim=-1)
        rows = {"latent": self._normed(c, self.kv_gain)}
        return q, q_rot, rows | ({"k_rope": k_rot} if d_r else {})

    def _normed(self, z: Tensor, gain: Tensor | None) -> Tensor:
        return z if gain is None else rms_norm(z, gain, self.eps)

    def keys(self, rows: dict[str, Tensor], call: Call) -> tuple[Tensor, Tensor]:
        """Materialised content keys ``(B, H, S, d_n)`` and values ``(B, H, S, d_v)``."""
        d_n, _, d_v = self.widths
        both = self.kv_up(rows["latent"][:, 0]).unflatten(-1, (self.heads, d_n + d_v)).transpose(1, 2)
        return both.split([d_n, d_v], dim=-1)

    def join(self, q: Tensor, q_rot: Tensor, k: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys with their rotary slices appended."""
        return torch.cat([q, q_rot], dim=-1), torch.cat(
            [k, rows["k_rope"].expand(-1, self.heads, -1, -1)], dim=-1
        )

    def absorbs(self, new: int, keys: int) -> bool:
        d_n, d_r, d_v = self.widths
        if new == keys:
            return False
        up = self.heads * self.rank * (d_n + d_v)
        materialised = keys * up + new * keys * self.heads * (d_n + d_r + d_v)
        return new * up + new * keys * self.heads * (2 * self.rank + d_r) < materialised

    def absorbed(self, q: Tensor, q_rot: Tensor, rows: dict[str, Tensor], turn: Callable):
        """The queries in latent space, one key head whose value is its own latent part, and the way back."""
        d_n, _, d_v = self.widths
        up = self.kv_up.weight.unflatten(0, (self.heads, d_n + d_v))
        up_k, up_v = up.split([d_n, d_v], dim=1)
        c = rows["latent"]
        q = q @ up_k.to(q.dtype)
        if self.turned:
            q = torch.cat([q, q_rot], dim=-1)
        keys = Keys(c, c, rest=rows.get("k_rope"))
        return q, keys, lambda z: torch.einsum("bthc,hvc->bthv", z, up_v.to(z.dtype))

    def memory(self) -> dict[str, Slot]:
        rows = {"latent": Slot("rows", (1, self.rank))}
        return rows | ({"k_rope": Slot("rows", (1, self.widths[1]))} if self.turned else {})

    def work(self, length: int) -> Iterable[Work]:
        d_n, d_r, d_v = self.widths
        per = 2 * length
        if self.q_rank:
            yield Work("projections", "W_dq", per * self.dim * self.q_rank)
        yield Work(
            "projections", "W_uq", per * (self.q_rank or self.dim) * self.heads * (d_n + d_r), per_head=True
        )
        yield Work("projections", "W_dkv", per * self.dim * (self.rank + d_r))
        yield Work("projections", "W_ukv", per * self.rank * self.heads * (d_n + d_v))


@register(
    Card(
        name="mla",
        title="Multi-head latent attention",
        paper="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
        arxiv="2405.04434",
        family="latent",
        summary="Keys and values are made from one cached low-rank latent and one shared rotary key.",
        cached="the latent and the rotary key: d_c + d_r per token",
        claims=("DeepSeek-V2 against their 67B: cache -93.3 %, generation throughput 5.76 x",),
    ),
    fixed={
        "num_kv_heads": "all heads share one latent; set kv_lora_rank for a smaller cache",
        "head_dim": "widths are set by qk_nope_head_dim, qk_rope_head_dim and v_head_dim",
        "qkv_bias": "the latent projections have no bias",
    },
)
def mla(
    draft: Draft,
    *,
    kv_lora_rank: int | None = None,
    q_lora_rank: int = 0,
    qk_nope_head_dim: int | None = None,
    qk_rope_head_dim: int | None = None,
    v_head_dim: int | None = None,
    latent_norm: bool = True,
    allow_expand: bool = False,
) -> None:
    """Sets the projection.

    Args:
        kv_lora_rank: d_c; default min(4, H) D / H. q_lora_rank: r_q, 0 = none.
        qk_nope_head_dim, v_head_dim: d_n, d_v; default D / H.
        qk_rope_head_dim: d_r, even; default half of D / H; 0 with pos=none.
        latent_norm: RMSNorm on both latents. allow_expand: lets d_c reach H (d_n + d_v).

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: gqa without positions, with d_r = 0, no norm and a block-selecting W_ukv; its own absorbed
        form.
    """
    H, width, rope = draft.num_heads, draft.head_dim, draft.host["pos"] == "rope"
    d_n = width if qk_nope_head_dim is None else qk_nope_head_dim
    d_v = width if v_head_dim is None else v_head_dim
    d_r = (max(2, width // 4 * 2) if rope else 0) if qk_rope_head_dim is None else qk_rope_head_dim
    rank = min(4, H) * width if kv_lora_rank is None else kv_lora_rank
    for name, value in (("qk_nope_head_dim", d_n), ("v_head_dim", d_v), ("kv_lora_rank", rank)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    if q_lora_rank < 0:
        raise ValueError(f"q_lora_rank: must be at least 0 (0 = none), got {q_lora_rank}")
    if rope != (d_r > 0):
        raise ValueError(
            f"qk_rope_head_dim: must be {'positive' if rope else '0'} with pos={draft.host['pos']}, got {d_r}"
        )
    if rank >= H * (d_n + d_v) and not allow_expand:
        raise ValueError(
            f"kv_lora_rank: {rank} does not compress H (d_n + d_v) = {H * (d_n + d_v)}; "
            "lower it or set allow_expand=true"
        )

    def unshared(done: Draft) -> None:
        if done.num_kv_heads != H:
            raise ValueError(
                f"num_kv_heads: all heads share one latent, got {done.num_kv_heads} by add; leave one out"
            )

    draft.last(unshared)
    draft.head_dim, draft.v_head_dim, draft.rotary = d_n, d_v, d_r
    draft.put(
        "project", Latent(draft, (d_n, d_r, d_v), rank, q_lora_rank, latent_norm, draft.host["norm_eps"])
    )
