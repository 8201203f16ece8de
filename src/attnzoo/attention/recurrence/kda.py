"""Kimi Delta Attention: a delta rule whose memory forgets per key channel.

Kimi Linear: An Expressive, Efficient Attention Architecture, arXiv 2510.26692.

    q, k, v = silu(conv(x W)),  q, k of unit length per head,  beta_t = sigmoid(x W_beta)
    g_t = -exp(A_log_h) softplus(x F_1 F_2 + dt_bias)          per key channel of each value head
        or, safe_gate:  lower_bound sigmoid(exp(A_log_h) (x F_1 F_2 + dt_bias))
    S <- Diag(exp(g_t)) S,   S <- S + beta_t k_t (v_t - S^T k_t)^T,   o_t = S^T q_t / sqrt(d_k)
    y = concat(RMSNorm_head(o) * sigmoid(x G_1 G_2 + b)) W_o           F_1 and G_1 to d_v channels

Cached: S (H_v d_k d_v) in fp32 and the last conv_kernel - 1 inputs of each convolution. In the paper's models
one layer in four has latent attention without positions: a layout. Our choice: the gate's bias b, which the
released layer has and its port has not, is an option.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attnzoo.attention.draft import Draft
from attnzoo.attention.stages.combine import HeadNorm, LowRankGate
from attnzoo.attention.stages.gates import ChannelDecayBeta
from attnzoo.attention.stages.refine import Activation, L2Norm, ShortConv
from attnzoo.cards import Claim
from attnzoo.registry import Card, register


@register(
    Card(
        name="kda",
        title="Kimi Delta Attention",
        paper="Kimi Linear: An Expressive, Efficient Attention Architecture",
        arxiv="2510.26692",
        family="recurrence",
        summary="A delta rule whose memory forgets per key channel.",
        cached="the state S (H_v d_k d_v) and convolution tails: constant in the length",
        claims=(
            Claim(
                "ahead of full latent attention under one recipe",
                where="48B, three layers to one of latent attention",
            ),
            Claim("up to 75 % less cache", where="48B, three layers to one of latent attention"),
            Claim(
                "up to 6 times faster decoding",
                where="48B, three layers to one of latent attention, 1M tokens",
            ),
        ),
        small={"chunk_size": 4, "num_v_heads": 8, "safe_gate": True},
    ),
    frames=("recurrent",),
)
def kda(
    draft: Draft,
    *,
    num_v_heads: int | None = None,
    expand_v: float = 1.0,
    safe_gate: bool = False,
    lower_bound: float = -5.0,
    use_short_conv: bool = True,
    conv_kernel: int = 4,
    allow_neg_eigval: bool = False,
    gate_bias: bool = True,
) -> None:
    """Sets refinement, gates and read-out.

    Args:
        num_v_heads: H_v, a multiple of num_heads (default as many values as keys). expand_v: d_v / d_k.
        safe_gate: log decays bounded below by lower_bound, which is in [-5, 0).
        use_short_conv: the convolutions (their silu stays). conv_kernel: taps.
        allow_neg_eigval: beta up to 2. gate_bias: b.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: gated_deltanet's core where the channels of a head share their decay.
    """
    H, H_v = draft.num_heads, num_v_heads
    if H_v is not None and (H_v < H or H_v % H):
        raise ValueError(f"num_v_heads: must be a multiple of num_heads={H}, got {H_v}")
    if not -5 <= lower_bound < 0:
        raise ValueError(f"lower_bound: must be in [-5, 0), got {lower_bound}")
    width = draft.head_dim * expand_v
    if width < 1 or width != int(width):
        raise ValueError(
            f"expand_v: head_dim={draft.head_dim} times it must be a whole number, got {expand_v} ({width})"
        )
    draft.v_head_dim = width = int(width)
    if H_v is not None:
        draft.num_v_heads = draft.o_heads = H_v
    acts, shapes = [F.silu] * 3, list(draft.shapes().values())
    draft.put("refine", ShortConv(shapes, conv_kernel, acts) if use_short_conv else Activation(acts))
    draft.put("refine", L2Norm())
    bound = lower_bound if safe_gate else None
    draft.put("gates", ChannelDecayBeta(draft, width, bound, allow_neg_eigval))
    draft.put("combine", HeadNorm(width, draft.host["norm_eps"]))
    gate = LowRankGate(draft.site, draft.dim, draft.o_heads, width, torch.sigmoid, width, gate_bias)
    draft.put("combine", gate)
