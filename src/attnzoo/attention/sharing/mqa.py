"""Multi-query attention: one key head and one value head, shared by all query heads.

Fast Transformer Decoding: One Write-Head is All You Need, arXiv 1911.02150.

    q = x W_q (H heads),  k, v = x W_k, x W_v (one head),  RoPE on q and k
    o_i,h = sum_(j <= i) softmax_j(q_i,h . k_j / sqrt(d)) v_j
    y     = concat_h(o) W_o

Cached: k (after RoPE) and v, 2 d per token. The paper widens the MLP to keep the parameter count; that is the
model's ``mlp_hidden``, not the mixer's.
"""

from __future__ import annotations

from attnzoo.attention.draft import Draft
from attnzoo.cards import Claim
from attnzoo.registry import Card, register


@register(
    Card(
        name="mqa",
        title="Multi-query attention",
        paper="Fast Transformer Decoding: One Write-Head is All You Need",
        arxiv="1911.02150",
        family="sharing",
        summary="One key head and one value head, shared by all query heads.",
        cached="k, v: 2 d per token",
        claims=(
            Claim("BLEU 26.5 against 26.7 of mha", where="WMT14 En-De, dev"),
            Claim("decoding 12 x faster", "decode_ms", "lower", "mha", "WMT14 En-De, the paper's TPU"),
            Claim("far smaller keys and values to read in decoding", "cache_bytes", "lower", "mha"),
        ),
    ),
    host={"num_kv_heads": 1},
    fixed={"num_kv_heads": "mqa has one key/value head by definition; use gqa"},
)
def mqa(draft: Draft) -> None:
    """The frame with one key/value head.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: gqa with num_kv_heads = 1; mha whose key and value heads are all the same.
    """
