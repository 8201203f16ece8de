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

from attnzoo.attention.draft import Draft
from attnzoo.attention.latent.latent import FIXED, Latent, check_rank, settle, sizes
from attnzoo.cards import Claim
from attnzoo.registry import Card, register


@register(
    Card(
        name="mla",
        title="Multi-head latent attention",
        paper="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
        arxiv="2405.04434",
        family="latent",
        summary="Keys and values are made from one cached low-rank latent and one shared rotary key.",
        cached="the latent and the rotary key: d_c + d_r per token",
        claims=(
            Claim("cache -93.3 %, generation throughput 5.76 x", where="DeepSeek-V2 against their 67B"),
            Claim("better than mha on benchmarks", where="DeepSeek-V2's ablations"),
            Claim("4 to 14 % of mha's cache", "cache_bytes", "lower", "mha", "DeepSeek-V2's ablations"),
        ),
    ),
    fixed=FIXED,
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
    widths, _, rank = sizes(draft, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, q_lora_rank)
    rank = rank if kv_lora_rank is None else kv_lora_rank
    check_rank("kv_lora_rank", rank, draft.num_heads, widths, allow_expand)
    settle(draft, widths, Latent(draft, widths, rank, q_lora_rank, latent_norm, draft.host["norm_eps"]))
