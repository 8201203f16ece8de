"""Gated linear attention: each key channel of the state forgets at a pace made from the token.

Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv 2312.06635.

    q, k = x W of width expand_k D,   v = x W_v of width expand_v D
    g_t = logsigmoid(x W_1 W_2 + b) / 16                  per key channel, W_1 to gate_low_rank channels
    S_t = Diag(exp(g_t)) S_(t-1) + k_t v_t^T,   o_t = S_t^T q_t / sqrt(d_k)
    y = concat(RMSNorm_head(o) * silu(x W_g)) W_o

Cached: S (H d_k d_v) in fp32, with ``use_short_conv`` the last conv_kernel - 1 inputs of the convolutions.
Keys, values and gates of grouped heads are made once per group.
"""

from __future__ import annotations

import torch.nn.functional as F

from attnzoo.attention.draft import Draft
from attnzoo.attention.stages.combine import Gate, HeadNorm
from attnzoo.attention.stages.gates import LowRankDecay
from attnzoo.attention.stages.refine import ShortConv
from attnzoo.cards import Claim
from attnzoo.registry import Card, register


def per_head(draft: Draft, name: str, expand: float) -> int:
    """Width of a head where all heads together have ``expand * dim`` channels."""
    total = expand * draft.dim
    if total < 1 or total != int(total) or int(total) % draft.num_heads:
        raise ValueError(
            f"{name}: {expand} * dim = {total} must be a whole multiple of num_heads={draft.num_heads}, "
            f"got {expand}"
        )
    return int(total) // draft.num_heads


@register(
    Card(
        name="gla",
        title="Gated linear attention",
        paper="Gated Linear Attention Transformers with Hardware-Efficient Training",
        arxiv="2312.06635",
        family="recurrence",
        summary="Each key channel of the state forgets at a pace made from the token.",
        cached="the state S (H d_k d_v): constant in the length",
        claims=(
            Claim("level with Llama-type Transformers", "val_bpb", "equal", "mha", "1.3B / 100B tokens"),
            Claim("extends from 2k to 20k tokens", where="1.3B / 100B tokens"),
            Claim("trains faster than Mamba", where="1.3B / 100B tokens"),
        ),
        small={"chunk_size": 4, "num_kv_heads": 2, "use_short_conv": True, "gate_logit_normalizer": 1.0},
    ),
    frames=("recurrent",),
)
def gla(
    draft: Draft,
    *,
    expand_k: float = 0.5,
    expand_v: float = 1.0,
    gate_low_rank: int = 16,
    gate_logit_normalizer: float = 16.0,
    clamp_min: float | None = None,
    use_short_conv: bool = False,
    conv_kernel: int = 4,
) -> None:
    """Sets widths, decay and read-out.

    Args:
        expand_k, expand_v: widths of all keys and of all values over dim, multiples of num_heads;
            ``head_dim`` of the frame, where given, is d_k itself.
        gate_low_rank: columns of W_1. gate_logit_normalizer: divides the log decay.
        clamp_min: least log decay, at most 0. use_short_conv: convolutions with silu on q, k, v.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: unnormalised linear attention as b grows; equal decays in a head: a scalar gate.
    """
    if gate_low_rank < 1:
        raise ValueError(f"gate_low_rank: must be at least 1, got {gate_low_rank}")
    if gate_logit_normalizer <= 0:
        raise ValueError(f"gate_logit_normalizer: must be positive, got {gate_logit_normalizer}")
    if clamp_min is not None and clamp_min > 0:
        raise ValueError(f"clamp_min: a log decay is at most 0, got {clamp_min}; give a negative number")
    if draft.host["head_dim"] is None:
        draft.head_dim = per_head(draft, "expand_k", expand_k)
    draft.v_head_dim = per_head(draft, "expand_v", expand_v)
    if use_short_conv:
        draft.put("refine", ShortConv(list(draft.shapes().values()), conv_kernel, [F.silu] * 3))
    draft.put("gates", LowRankDecay(draft, gate_low_rank, gate_logit_normalizer, clamp_min))
    draft.put("combine", HeadNorm(draft.v_head_dim, draft.host["norm_eps"]))
    draft.put("combine", Gate(draft.site, draft.dim, draft.o_heads, draft.v_head_dim, F.silu))
