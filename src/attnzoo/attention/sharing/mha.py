"""Multi-head attention: every head has queries, keys and values of its own.

Attention Is All You Need, arXiv 1706.03762.

    q, k, v = x W_q, x W_k, x W_v                    heads of width d, RoPE on q and k
    o_i,h   = sum_(j <= i) softmax_j(q_i,h . k_j,h / sqrt(d)) v_j,h
    y       = concat_h(o) W_o

Cached: k (after RoPE) and v, 2 H d per token.
"""

from __future__ import annotations

from attnzoo.attention.draft import Draft
from attnzoo.registry import Card, register


@register(
    Card(
        name="mha",
        title="Multi-head attention",
        paper="Attention Is All You Need",
        arxiv="1706.03762",
        family="sharing",
        summary="Every head has queries, keys and values of its own; the baseline of every comparison.",
        cached="k, v: 2 H d per token",
    ),
    fixed={"num_kv_heads": "mha has one key/value head per query head; use gqa"},
)
def mha(draft: Draft) -> None:
    """The frame as it is.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: itself under a permutation of heads; under RoPE, y does not change when all positions shift.
    """

    def ungrouped(done: Draft) -> None:
        if done.num_kv_heads != done.num_heads:
            raise ValueError(
                f"num_kv_heads: mha has one key/value head per query, got {done.num_kv_heads} by add; use gqa"
            )

    draft.last(ungrouped)
