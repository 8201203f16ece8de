"""Gated DeltaNet: a fast-weight memory that forgets by a gate and overwrites what a key held.

Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv 2412.06464; the delta rule in parallel,
2406.06484.

    q, k, v = silu(conv(x W)),  q, k of unit length per head
    g_t = -exp(A_log) softplus(x W_a + dt_bias),  beta_t = sigmoid(x W_beta)         per value head
    S <- exp(g_t) S,   S <- S + beta_t k_t (v_t - S^T k_t)^T,   o_t = S^T q_t / sqrt(d_k)
    y = concat(RMSNorm_head(o) * silu(x W_g)) W_o

Cached: S (H_v d_k d_v) in fp32 and the last conv_kernel - 1 inputs of each convolution. Our choice: d_k = 3/4
of D / H, so that a layer has about 6 D^2 parameters; A_log = log U(1e-3, 16), finite.
"""

from __future__ import annotations

import torch.nn.functional as F

from attnzoo.attention.draft import Draft
from attnzoo.attention.stages.combine import Gate, HeadNorm
from attnzoo.attention.stages.gates import StepDecayBeta
from attnzoo.attention.stages.refine import Activation, L2Norm, ShortConv
from attnzoo.cards import Claim
from attnzoo.registry import Card, register


@register(
    Card(
        name="gated_deltanet",
        title="Gated DeltaNet",
        paper="Gated Delta Networks: Improving Mamba2 with Delta Rule",
        arxiv="2412.06464",
        family="recurrence",
        summary="A fast-weight memory that forgets by a gate and overwrites what a key held.",
        cached="the state S (H_v d_k d_v) and convolution tails: constant in the length",
        claims=(
            Claim("better perplexity than Mamba-2", "val_bpb", "lower", "mamba2", "1.3B / 100B tokens"),
            Claim("better perplexity than DeltaNet", "val_bpb", "lower", "deltanet", "1.3B / 100B tokens"),
            Claim("better recall than Mamba-2", "accuracy:mqar", "higher", "mamba2", "1.3B / 100B tokens"),
            Claim("better recall than DeltaNet", "accuracy:mqar", "higher", "deltanet", "1.3B / 100B tokens"),
        ),
        small={"chunk_size": 4},
    ),
    frames=("recurrent",),
)
def gated_deltanet(
    draft: Draft,
    *,
    num_v_heads: int | None = None,
    expand_v: float = 2.0,
    use_gate: bool = True,
    use_short_conv: bool = True,
    conv_kernel: int = 4,
    allow_neg_eigval: bool = False,
) -> None:
    """Sets refinement, gates and read-out.

    Args:
        num_v_heads: H_v, a multiple of num_heads (default the same). expand_v: d_v / d_k, d_v a whole number.
        use_gate: the output gate. use_short_conv: the convolutions (their silu stays). conv_kernel: taps.
        allow_neg_eigval: beta up to 2.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: deltanet's core without decay; mamba2's core without the removal.
    """
    H = draft.num_heads
    H_v = H if num_v_heads is None else num_v_heads
    if H_v < H or H_v % H:
        raise ValueError(f"num_v_heads: must be a multiple of num_heads={H}, got {H_v}")
    if draft.host["head_dim"] is None:
        draft.head_dim = max(1, 3 * draft.dim // (4 * H))
    d_v = draft.head_dim * expand_v
    if d_v < 1 or d_v != int(d_v):
        raise ValueError(
            f"expand_v: head_dim={draft.head_dim} times it must be a whole number, got {expand_v} ({d_v})"
        )
    draft.v_head_dim, draft.o_heads = int(d_v), H_v
    acts = [F.silu] * 3
    shapes = list(draft.shapes().values())
    draft.put("refine", ShortConv(shapes, conv_kernel, acts) if use_short_conv else Activation(acts))
    draft.put("refine", L2Norm())
    draft.put("gates", StepDecayBeta(draft, allow_neg_eigval))
    draft.put("combine", HeadNorm(draft.v_head_dim, draft.host["norm_eps"]))
    if use_gate:
        draft.put("combine", Gate(draft.site, draft.dim, H_v, draft.v_head_dim, F.silu))
