"""Tensor-parallel latent attention: heads attend in each slice of one latent apart, and the outputs add up.

TPLA: Tensor Parallel Latent Attention for Efficient Disaggregated Prefill and Decode Inference, arXiv
2508.15881.

    q_n, q_r, k_r, c_0 as in mla;  slice r = 1..g takes d_c / g channels of c and those rows of U_K,h, U_V,h
    s_ij,h,r = (mu_r q_n,i,h . c_j,r U_K,h,r + q_r,i,h . k_r,j) / sqrt(d_n + d_r)
    o_i,h    = sum_r sum_(j <= i) softmax_j(s_ij,h,r) c_j,r U_V,h,r          y = concat_h(o) W_o
    norm "global":  c = RMSNorm(c_0)
    norm "sharded": c_r = gamma_r c_0,r / sqrt(|c_0,r|^2 / (d_c rho_r) + eps)

Cached: c after its norm and k_r after RoPE, d_c + d_r per token; each of g devices holds d_c / g + d_r. The
materialised form is H g heads. The paper splits a trained mla (rho_r: slice r's share of the latent's energy,
mu_r = 1 / rho_r). Our choice: trained from scratch, g = 2, mu_r = 1, rho_r = 1 / g, mla's norm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.latent.latent import FIXED, Latent, check_rank, settle, sizes
from attnzoo.cards import Claim
from attnzoo.ops.fused import rms_norm
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


class ShardedLatent(Latent):
    """`Latent` that every head reads in slices; heads with scores are ordered by slice, then by head.

    Args:
        gains: mu, one per slice. shares: rho, one per slice, for a norm of each slice; None = mla's norm.
    """

    def __init__(
        self,
        draft: Draft,
        widths: tuple[int, int, int],
        rank: int,
        q_rank: int,
        norm: bool,
        eps: float,
        gains: tuple[float, ...],
        shares: tuple[float, ...] | None,
    ) -> None:
        g = len(gains)
        super().__init__(draft, widths, rank, q_rank, norm, eps, parts=g, kv_heads=g * draft.num_heads)
        self.gains, self.shares, self.slices = gains, shares, g
        self.mine = slice(None)  # slices that this rank has
        # even where it is empty: `join` spreads the queries over the slices
        self.turned = ("k_rope",)

    @property
    def width(self) -> int:
        return self.rank // self.slices

    def make_up(self, draft: Draft) -> nn.Module:
        return draft.linear("kv_up", self.rank, self.heads * (self.widths[0] + self.widths[2]))

    def per_head(self) -> Tensor:
        up = self.kv_up.weight.unflatten(0, (self.heads, -1)).unflatten(-1, (self.parts, -1))
        return up.permute(2, 0, 1, 3).flatten(0, 1)

    def latents(self, c: Tensor, call: Call) -> Tensor:
        n = self.slices
        if self.shares is None:
            return self.normed(c, "kv").unflatten(-1, (n, self.width)).transpose(1, 2)[:, self.mine]
        parts = []
        own = zip(c.chunk(n, dim=-1), self.kv_gain.chunk(n), self.shares, strict=True)
        for part, gain, share in list(own)[self.mine]:
            loud = n * share  # the slice's mean square over that of the whole latent
            parts.append(rms_norm(part, gain, self.eps * loud) * loud**0.5)
        return torch.stack(parts, dim=1)

    def spread(self, q: Tensor, q_rot: Tensor) -> tuple[Tensor, Tensor]:
        q = torch.cat([q if gain == 1.0 else q * gain for gain in self.gains], dim=1)
        return q, q_rot.repeat(1, self.parts, 1, 1)

    def heads_share(self, share: Share) -> Share:
        """Whole heads where the slices divide among the ranks: as in the paper each rank then caches its own
        slices and reads them with all heads. Elsewhere ranks split heads, as of mla."""
        return share if self.slices % share.ranks else share.whole()

    def split(self, share: Share) -> None:
        d_n, d_r, d_v = self.widths
        if share.ways == 1:
            slices = replace(share, ways=None)
            slices.columns(self.kv_up, self.slices, self.width)
            self.mine, self.parts = slices.part(self.slices).rows, slices.count(self.slices)
            self.gains = self.gains[self.mine]
        else:
            share.rows(self.q_up, (self.heads, d_n + d_r))
            share.rows(self.kv_up, (self.heads, d_n + d_v))
            self.heads = share.count(self.heads)
        self.kv_heads = self.heads * self.parts
        share.keep(self)


class SumShards(Stage):
    """The slices' outputs of each head, added up: ``(B, T, g H, d_v)`` -> ``(B, T, H, d_v)``."""

    rank = 10
    additive = True

    def __init__(self, shards: int) -> None:
        super().__init__()
        self.shards = shards

    def split(self, share: Share) -> None:
        if share.ways == 1:  # see `ShardedLatent.heads_share`
            self.shards //= share.ranks

    def forward(self, o: Tensor, call: Call) -> Tensor:
        return o.unflatten(2, (self.shards, -1)).sum(2)


@register(
    Card(
        name="tpla",
        title="Tensor-parallel latent attention",
        paper="TPLA: Tensor Parallel Latent Attention for Efficient Disaggregated Prefill & Decode Inference",
        arxiv="2508.15881",
        family="latent",
        summary="Each head attends in every slice of one latent with a softmax of its own; outputs add up.",
        cached="the latent and the rotary key: d_c + d_r per token, d_c / g + d_r on each of g devices",
        claims=(
            Claim("decoding 1.79 x and 1.93 x faster", where="DeepSeek-V3 and Kimi-K2 at 32k tokens"),
            Claim("perplexity 6.31 (mla) -> 7.24", where="WikiText-2, without training"),
        ),
        small={"latent_shards": 4, "shard_norm": "sharded", "shard_gain": (1.5, 1.0, 0.7, 2.0)},
    ),
    fixed=FIXED,
)
def tpla(
    draft: Draft,
    *,
    latent_shards: int = 2,
    shard_norm: Literal["global", "sharded"] = "global",
    shard_gain: tuple[float, ...] | None = None,
    shard_share: tuple[float, ...] | None = None,
    kv_lora_rank: int | None = None,
    q_lora_rank: int = 0,
    qk_nope_head_dim: int | None = None,
    qk_rope_head_dim: int | None = None,
    v_head_dim: int | None = None,
    latent_norm: bool = True,
    allow_expand: bool = False,
) -> None:
    """Sets the projection and the sum over slices.

    Args:
        latent_shards: g, a divisor of d_c. shard_norm: one norm of the latent, or one per slice.
        shard_gain: mu, factor of each slice's latent scores; default 1.
        shard_share: rho > 0 of each slice, for shard_norm=sharded; default 1 / g.
        kv_lora_rank: d_c; default min(4, H) D / H, rounded down to a multiple of g.
        q_lora_rank: r_q, 0 = none.
        qk_nope_head_dim, v_head_dim: d_n, d_v; default D / H.
        qk_rope_head_dim: d_r, even; default half of D / H; 0 with pos=none.
        latent_norm: RMSNorm on both latents. allow_expand: lets d_c reach H (d_n + d_v).

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mla with one slice; its own absorbed form.
    """
    g = latent_shards
    if g < 1:
        raise ValueError(f"latent_shards: must be at least 1, got {g}")
    widths, _, rank = sizes(draft, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, q_lora_rank)
    rank = max(g, rank // g * g) if kv_lora_rank is None else kv_lora_rank
    check_rank("kv_lora_rank", rank, draft.num_heads, widths, allow_expand)
    if rank % g:
        raise ValueError(f"latent_shards: must divide kv_lora_rank={rank}, got {g}; change one of them")
    for name, values in (("shard_gain", shard_gain), ("shard_share", shard_share)):
        if values is not None and len(values) != g:
            raise ValueError(f"{name}: needs one value per slice, latent_shards={g}, got {list(values)}")
    if shard_share is not None and min(shard_share) <= 0:
        raise ValueError(f"shard_share: must be positive, got {list(shard_share)}")
    sharded = shard_norm == "sharded"
    if shard_share is not None and not sharded:
        raise ValueError(f"shard_share: belongs to shard_norm=sharded, got {list(shard_share)}; set that too")
    if sharded and not latent_norm:
        raise ValueError("shard_norm: there is no norm with latent_norm=false, got 'sharded'; leave it out")
    gains, shares = shard_gain or (1.0,) * g, (shard_share or (1 / g,) * g) if sharded else None
    eps = draft.host["norm_eps"]
    project = ShardedLatent(draft, widths, rank, q_lora_rank, latent_norm, eps, gains, shares)
    settle(draft, widths, project)
    draft.score_heads = g * draft.num_heads
    draft.put("combine", SumShards(g))
