"""Multi-scale retention: linear attention with RoPE in which each head forgets at a pace of its own.

Retentive Network: A Successor to Transformer for Large Language Models, arXiv 2307.08621.

    q, k = rope(x W),   v = x W_v of width expand_v d,   gamma_h = 1 - 2^(-5-h), h = 0 .. H - 1
    S_t = gamma_h S_(t-1) + k_t v_t^T,   o_t = S_t^T q_t / sqrt(d)
    y = concat(RMSNorm_head(o) * silu(x W_g)) W_o        the norm without a gain unless norm_affine

Cached: S (H d_k d_v) in fp32, keys turned. More than some 11 heads make paces that no sequence can tell apart
from 1; keep heads wide. Our choice: the rescalings of the released training code (rows of the decay matrix,
sums of scores) are left out, because the head norm cancels them up to its eps; matrices start as everywhere
here, N(0, 0.02^2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention.draft import Draft
from attnzoo.attention.stages.combine import Gate, HeadNorm
from attnzoo.attention.stages.gates import FixedDecay
from attnzoo.registry import Card, register


def paces(head: Tensor) -> Tensor:
    """``log(1 - 2^(-5-h))``."""
    return torch.log1p(-torch.exp2(-5 - head))


@register(
    Card(
        name="retnet",
        title="Multi-scale retention",
        paper="Retentive Network: A Successor to Transformer for Large Language Models",
        arxiv="2307.08621",
        family="recurrence",
        summary="Linear attention with RoPE in which each head forgets at a pace of its own.",
        cached="the state S (H d_k d_v): constant in the length",
        claims=(
            "ahead of the Transformer from about 2B parameters; at 6.7B and 8k tokens 8.4 times faster "
            "decoding, 70 % less memory",
        ),
        small={"chunk_size": 4, "norm_affine": True},
    ),
    frames=("recurrent",),
    host={"pos": "rope"},
)
def retnet(draft: Draft, *, expand_v: float = 2.0, norm_affine: bool = False) -> None:
    """Sets decay, value width and read-out.

    Args:
        expand_v: d_v / d_k, d_v a whole number. norm_affine: a gain of the head norm.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: linear (identity map, unnormalised) with gamma = 1 and without rotation.
    """
    width = draft.head_dim * expand_v
    if width < 1 or width != int(width):
        raise ValueError(
            f"expand_v: head_dim={draft.head_dim} times it must be a whole number, got {expand_v} ({width})"
        )
    draft.v_head_dim = int(width)
    draft.put("gates", FixedDecay(draft.o_heads, paces))
    draft.put("combine", HeadNorm(draft.v_head_dim, draft.host["norm_eps"], norm_affine))
    draft.put("combine", Gate(draft.site, draft.dim, draft.o_heads, draft.v_head_dim, F.silu))
