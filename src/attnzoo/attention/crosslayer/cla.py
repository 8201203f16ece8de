"""Cross-layer attention: every s-th layer makes keys and values, the s - 1 layers after it reuse them.

Reducing Transformer Key-Value Cache Size with Cross-Layer Attention, arXiv 2405.12981.

    p(l)  = l for l < o, else o + s floor((l - o) / s)                 o = offset
    producer (l = p(l)):  q, k, v = x W_q, x W_k, x W_v,  RoPE on q and k
    consumer (l > p(l)):  q = x W_q,  RoPE on q;  k, v are those of layer p(l), after RoPE (and its k norm)
    o_i,h = sum_(j <= i) softmax_j(q_i,h . k_j,g / sqrt(d)) v_j,g,  y = concat_h(o) W_o

Cached: k (after RoPE) and v in producers, 2 G d / s per token and layer on average; nothing in consumers. The
paper finds s = 2 on top of one key/value head best. Our choice: the number of key/value heads is the host's.
"""

from __future__ import annotations

from attnzoo.attention.crosslayer.borrow import share_keys
from attnzoo.attention.draft import Draft
from attnzoo.cards import Claim
from attnzoo.registry import Card, register


@register(
    Card(
        name="cla",
        title="Cross-layer attention",
        paper="Reducing Transformer Key-Value Cache Size with Cross-Layer Attention",
        arxiv="2405.12981",
        family="crosslayer",
        summary="Every s-th layer makes keys and values; the layers between reuse them.",
        cached="k, v in every s-th layer: 2 G d / s per token on average",
        claims=(
            Claim("half the cache", "cache_bytes", "lower", "mha", "1B and 3B, on one key/value head"),
            Claim("nearly equal perplexity", "val_bpb", "equal", "mha", "1B and 3B, on one key/value head"),
        ),
        layers=4,
    )
)
def cla(draft: Draft, *, cla_factor: int = 2, offset: int = 0) -> None:
    """Makes the layer a producer or a consumer by its index.

    Args:
        cla_factor: s, layers per set of keys, at least 1.
        offset: o, first layers that keep keys of their own, at least 0.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: its host (gqa) with cla_factor = 1.
    """
    if cla_factor < 1:
        raise ValueError(f"cla_factor: must be at least 1 (1 = nothing shared), got {cla_factor}")
    if offset < 0:
        raise ValueError(f"offset: must be at least 0, got {offset}")
    layer = draft.site.layer
    share_keys(draft, layer if layer < offset else layer - (layer - offset) % cla_factor)
