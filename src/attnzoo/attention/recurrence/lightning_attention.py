"""Lightning attention: linear attention whose heads forget by fixed slopes that flatten with depth.

MiniMax-01: Scaling Foundation Models with Lightning Attention, arXiv 2501.08313; the tiling, Lightning
Attention-2, 2401.04658.

    q, k, v = silu(x W)
    slope_h = 2^(-8 (h + 1) / H),  h = 0 .. H - 1,    f = 1 - l / (L - 1 + 1e-5) + 1e-5   at layer l of L
    S_t = exp(-slope_h f) S_(t-1) + k_t v_t^T,   o_t = S_t^T q_t        no scale
    y = (RMSNorm(concat(o)) * sigmoid(x W_g)) W_o        one norm over all heads

Cached: S (H d d) in fp32. The last layer all but keeps everything. MiniMax-01 has softmax attention in every
eighth layer: a layout. Our choice: a model of one layer has f = 1 + 1e-5, as the formula says at l = 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention.draft import Draft
from attnzoo.attention.stages.combine import FullNorm, Gate
from attnzoo.attention.stages.gates import FixedDecay
from attnzoo.attention.stages.refine import Activation
from attnzoo.cards import Claim
from attnzoo.registry import Card, register


def flattening(layer: int, depth: int) -> float:
    """The factor f of all slopes at a layer: from 1 down to almost 0."""
    return 1 - layer / (depth - 1 + 1e-5) + 1e-5


@register(
    Card(
        name="lightning_attention",
        title="Lightning attention",
        paper="MiniMax-01: Scaling Foundation Models with Lightning Attention",
        arxiv="2501.08313",
        family="recurrence",
        summary="Linear attention whose heads forget by fixed slopes that flatten with depth.",
        cached="the state S (H d d): constant in the length",
        claims=(Claim("trained at contexts of 1M tokens", where="456B, one layer in eight softmax"),),
        small={"chunk_size": 4},
        layers=2,
    ),
    frames=("recurrent",),
    host={"chunk_size": 256, "norm_eps": 1e-6},
)
def lightning_attention(draft: Draft) -> None:
    """Sets features, slopes and read-out.

    Args:
        layer_idx, num_layers (of the frame): l and L.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: retnet's core with gamma_h = exp(-slope_h f), silu features, no rotation and no scale.
    """
    H, site = draft.o_heads, draft.site
    factor = flattening(site.layer, site.depth)

    def slopes(head: Tensor) -> Tensor:
        return -torch.exp2(-8 * (head + 1) / H) * factor

    draft.scale = 1.0
    draft.put("refine", Activation([F.silu] * 3))
    draft.put("gates", FixedDecay(H, slopes))
    draft.put("combine", FullNorm(H, draft.v_head_dim, draft.host["norm_eps"]))
    draft.put("combine", Gate(site, draft.dim, H, draft.v_head_dim, torch.sigmoid))
