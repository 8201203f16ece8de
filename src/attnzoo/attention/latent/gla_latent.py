"""Grouped latent attention: g latents, each serving H/g query heads, so that ranks can split the cache.

Hardware-Efficient Attention for Fast Decoding, arXiv 2505.21487.

    queries as in mla;  [c_0,1 .. c_0,g ; k_r] = x W_dkv,  c_r = RMSNorm_r(c_0,r)  (one gain per latent)
    [k_n,h ; v_h] = c_r W_ukv,r      for the H/g heads h of block r
    scores, the one rotary key that all heads share, scale and output as in mla
    absorbed: q~_h against c_r itself: g key heads, d_l + d_r wide, whose values are the latents

Cached: the normed latents and the rotated key, g d_l + d_r per token. Our choice: g = 2 where H is even, else
1, and d_l so that all latents together are as wide as mla's; no biases (the released code has them by the
defaults of its linear layers) and the norm before the cache (it norms after reading).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.latent.latent import FIXED, Latent, check_rank, settle, sizes
from attnzoo.cards import Claim
from attnzoo.ops.fused import rms_norm
from attnzoo.registry import Card, register


class GroupedLatent(Latent):
    """`Latent` whose parts have a norm of their own."""

    split = Latent.split

    def latents(self, c: Tensor, call: Call) -> Tensor:
        parts = c.chunk(self.parts, dim=-1)
        if self.kv_gain is not None:
            gains = self.kv_gain.chunk(self.parts)
            parts = [rms_norm(part, gain, self.eps) for part, gain in zip(parts, gains, strict=True)]
        return torch.stack(parts, dim=1)


@register(
    Card(
        name="gla_latent",
        title="Grouped latent attention",
        paper="Hardware-Efficient Attention for Fast Decoding",
        arxiv="2505.21487",
        family="latent",
        summary="Several latents, each serving a block of query heads, and one shared rotary key.",
        cached="g latents and the rotary key: g d_l + d_r per token",
        claims=(
            Claim("two latents match mla's quality", "val_bpb", "equal", "mla"),
            Claim("up to 2 x faster decoding than mla", where="queries of two tokens"),
        ),
        small={"num_latent_heads": 4, "latent_dim": 6, "q_lora_rank": 12},
    ),
    fixed=FIXED | {"num_kv_heads": "heads share latents; set num_latent_heads and latent_dim instead"},
)
def gla_latent(
    draft: Draft,
    *,
    num_latent_heads: int | None = None,
    latent_dim: int | None = None,
    q_lora_rank: int = 0,
    qk_nope_head_dim: int | None = None,
    qk_rope_head_dim: int | None = None,
    v_head_dim: int | None = None,
    latent_norm: bool = True,
    allow_expand: bool = False,
) -> None:
    """Sets the projection.

    Args:
        num_latent_heads: g, a divisor of H; default 2 where H is even, else 1.
        latent_dim: d_l; default min(4, H) D / (H g). q_lora_rank: r_q, 0 = none.
        qk_nope_head_dim, v_head_dim: d_n, d_v; default D / H.
        qk_rope_head_dim: d_r, even; default half of D / H; 0 with pos=none.
        latent_norm: RMSNorm on the latents. allow_expand: lets d_l reach (H / g) (d_n + d_v).

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mla with one latent; mla with block-diagonal W_ukv, up to the norm; its own absorbed form.
    """
    H = draft.num_heads
    g = (1 if H % 2 else 2) if num_latent_heads is None else num_latent_heads
    if g < 1 or H % g:
        raise ValueError(f"num_latent_heads: must divide num_heads={H}, got {g}; change one of them")
    widths, _, rank = sizes(draft, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, q_lora_rank)
    width = max(1, rank // g) if latent_dim is None else latent_dim
    check_rank("latent_dim", width, H // g, widths, allow_expand)
    eps = draft.host["norm_eps"]
    settle(draft, widths, GroupedLatent(draft, widths, g * width, q_lora_rank, latent_norm, eps, parts=g))
