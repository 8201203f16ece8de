"""Grouped-query attention: G key/value heads, each serving H/G consecutive query heads.

GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints, arXiv 2305.13245.

    q = x W_q (H heads),  k, v = x W_k, x W_v (G heads),  RoPE on q and k
    o_i,h = sum_(j <= i) softmax_j(q_i,h . k_j,g / sqrt(d)) v_j,g        g = floor(h G / H)
    y     = concat_h(o) W_o

Cached: k (after RoPE) and v, 2 G d per token. Our choice: the default G is the largest divisor of H that is
at most max(1, H / 4), the ratio of most released models.
"""

from __future__ import annotations

from attnzoo.attention.draft import Draft, set_heads
from attnzoo.attention.stages.project import largest_divisor
from attnzoo.cards import Claim
from attnzoo.registry import Card, register


@register(
    Card(
        name="gqa",
        title="Grouped-query attention",
        paper="GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
        arxiv="2305.13245",
        family="sharing",
        summary="G key/value heads, each serving a group of consecutive query heads.",
        cached="k, v: 2 G d per token",
        claims=(
            Claim("47.1 against 47.2 of mha on average", where="T5-XXL uptrained 5 %, 8 groups"),
            Claim("0.28 s per sample, mha 1.51, mqa 0.24", "decode_ms", "lower", "mha", "T5-XXL, 8 groups"),
        ),
        small={"num_kv_heads": 2},
    ),
)
def gqa(draft: Draft) -> None:
    """The frame with ``num_kv_heads`` groups.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mha with num_kv_heads = num_heads; mqa with num_kv_heads = 1; mha whose key and value heads
        are copies.
    """
    if draft.host["num_kv_heads"] is None:
        H = draft.num_heads
        set_heads(draft, largest_divisor(H, H // 4), draft.host["head_dim"])
