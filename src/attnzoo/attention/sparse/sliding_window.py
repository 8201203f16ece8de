"""Sliding window with sinks: each query sees the last w tokens and the first few of its document.

Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453; the alternating form in gpt-oss.

    visible(i, j) = j <= i  and  (i - j < w  or  j < n_sink)
    o_i,h = sum_(j visible) softmax_j(q_i,h . k_j,h / sqrt(d)) v_j,h

w counts the query's own token; places are counted inside the document. Cached: a ring of w rows and n_sink
fixed rows of k (after RoPE) and v, whatever the length. Our choice: positions stay absolute in training and
decode (the paper's re-indexing inside the cache only differs once tokens were evicted, from a model trained
with full attention).
"""

from __future__ import annotations

from attnzoo.attention.draft import Draft
from attnzoo.cards import Claim
from attnzoo.registry import Card, register


@register(
    Card(
        name="sliding_window",
        title="Sliding window with sink tokens",
        paper="Efficient Streaming Language Models with Attention Sinks",
        arxiv="2309.17453",
        family="sparse",
        summary="Each query sees the last `window` tokens plus the first `n_sink` of its document.",
        cached="a ring of (window + n_sink) rows of k, v: constant in the length",
        claims=(
            Claim(
                "stable perplexity to 4M streamed tokens with 4 sinks, where a plain window collapses",
                where="models trained with full attention",
            ),
        ),
        small={"window": 5, "n_sink": 2},
    ),
    host={"window": 128, "n_sink": 4},
)
def sliding_window(draft: Draft) -> None:
    """The frame with a window by default.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mha with window >= T.
    """
    if draft.host["window"] is None:
        raise ValueError("window: sliding_window needs one, got null; set window or use mha")
