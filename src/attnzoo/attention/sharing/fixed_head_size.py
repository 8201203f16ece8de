"""Heads of one fixed width, however many there are.

Low-Rank Bottleneck in Multi-head Attention Models, arXiv 2002.07028.

    q, k, v = x W_q, x W_k, x W_v,  each D x (H d) with d free;  RoPE on q and k
    o_i,h   = sum_(j <= i) softmax_j(q_i,h . k_j,h / sqrt(d)) v_j,h
    y       = concat_h(o) W_o,  W_o (H d) x D

With d = D / H the T x T logits of a head have rank d < T, and more heads make it worse; here d stays.
Cached: k (after RoPE) and v, 2 H d per token. Our choice: d = 64 by default (the paper's theory asks d >= T,
practice takes 64 to 128); widths that no fused kernel serves have to be asked for.
"""

from __future__ import annotations

from attnzoo.attention.draft import Draft
from attnzoo.cards import Claim
from attnzoo.registry import Card, register

WIDEST = 256  # head width up to which fused kernels exist


@register(
    Card(
        name="fixed_head_size",
        title="Fixed head size",
        paper="Low-Rank Bottleneck in Multi-head Attention Models",
        arxiv="2002.07028",
        family="sharing",
        summary="The head width does not depend on the number of heads, so that no head is a low-rank one.",
        cached="k, v: 2 G d per token",
        claims=(
            Claim(
                "with fixed d more heads keep helping, with d = D / H they end up hurting",
                where="BERT-style pretraining and LM1B at small D",
            ),
        ),
        small={"head_dim": 6},
    ),
    frames=("score", "recurrent"),
    host={"head_dim": 64},
)
def fixed_head_size(draft: Draft, *, allow_slow: bool = False) -> None:
    """The frame with ``head_dim`` of its own.

    Args:
        allow_slow: lets head_dim exceed 256, where fused kernels end.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mha with head_dim = D / H.
    """
    width = draft.host["head_dim"]
    if width is None:
        raise ValueError(
            "head_dim: is fixed whatever the number of heads, got null; set it, or use mha for D / H"
        )
    if width > WIDEST and not allow_slow:
        raise ValueError(
            f"head_dim: fused kernels end at {WIDEST}, got {width}; lower it or set allow_slow=true"
        )
