"""DeltaNet: linear attention that overwrites what a key held instead of adding to it.

Parallelizing Linear Transformers with the Delta Rule over Sequence Length, arXiv 2406.06484; the rule itself,
2102.11174.

    q, k, v = silu(conv(x W)),   q, k of unit length per head,   beta_t = sigmoid(x W_beta)       per head
    S_t = S_(t-1) + beta_t k_t (v_t - S_(t-1)^T k_t)^T,   o_t = S_t^T q_t / sqrt(d)
    y = concat(RMSNorm_head(o)) W_o,   with use_gate: RMSNorm_head(o) * silu(x W_g)

Cached: S (H d d) in fp32 and the last conv_kernel - 1 inputs of each convolution. Our choice: with
``key_norm=sum`` a head whose channels add up to exactly 0 is left as it is.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.stages.combine import Gate, HeadNorm
from attnzoo.attention.stages.gates import Beta
from attnzoo.attention.stages.refine import Activation, L2Norm, ShortConv
from attnzoo.cards import Claim
from attnzoo.registry import Card, register

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": lambda z: F.elu(z) + 1,
    "identity": lambda z: z,
}


class SumNorm(Stage):
    """Queries and keys divided by the sum of their channels."""

    rank = 32
    alike = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        return self._share(q), self._share(k), v

    def _share(self, z: Tensor) -> Tensor:
        total = z.sum(-1, keepdim=True)
        return z / torch.where(total == 0, torch.ones_like(total), total)


@register(
    Card(
        name="deltanet",
        title="DeltaNet",
        paper="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        arxiv="2406.06484",
        family="recurrence",
        summary="Linear attention that overwrites what a key held instead of adding to it.",
        cached="the state S (H d d) and convolution tails: constant in the length",
        claims=(
            Claim("better perplexity than GLA", "val_bpb", "lower", "gla", "1.3B / 100B tokens"),
            Claim("better recall than GLA", "accuracy:mqar", "higher", "gla", "1.3B / 100B tokens"),
            Claim("better perplexity and recall than Mamba", where="1.3B / 100B tokens"),
            Claim("with sliding windows in between ahead of the Transformer", where="1.3B / 100B tokens"),
        ),
        small={"chunk_size": 4, "allow_neg_eigval": True, "use_gate": True},
    ),
    frames=("recurrent",),
)
def deltanet(
    draft: Draft,
    *,
    use_short_conv: bool = True,
    conv_kernel: int = 4,
    qk_activation: Literal["silu", "relu", "elu", "identity"] = "silu",
    key_norm: Literal["l2", "sum"] = "l2",
    use_beta: bool = True,
    use_gate: bool = False,
    allow_neg_eigval: bool = False,
) -> None:
    """Sets refinement, write strength and read-out.

    Args:
        use_short_conv: the convolutions (the activations stay). conv_kernel: taps.
        qk_activation: of q and k, elu meaning elu + 1; v keeps its silu.
        key_norm: q and k of unit length, or with channels that add up to 1. Without either the state grows
            without bound, so there is no "none".
        use_beta: learned write strength, else 1. allow_neg_eigval: twice that.
        use_gate: the output gate.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: gated_deltanet's core at g = 0; with orthonormal keys and beta = 1 a lookup table.
    """
    act = ACTIVATIONS[qk_activation]
    acts = [act, act, F.silu]
    shapes = list(draft.shapes().values())
    draft.put("refine", ShortConv(shapes, conv_kernel, acts) if use_short_conv else Activation(acts))
    draft.put("refine", L2Norm() if key_norm == "l2" else SumNorm())
    draft.put("gates", Beta(draft, use_beta, allow_neg_eigval))
    draft.put("combine", HeadNorm(draft.v_head_dim, draft.host["norm_eps"]))
    if use_gate:
        draft.put("combine", Gate(draft.site, draft.dim, draft.o_heads, draft.v_head_dim, F.silu))
