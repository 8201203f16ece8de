"""HGRN2: a gated recurrence that writes exactly what it makes room for, with forgetting that fades by depth.

HGRN2: Gated Linear RNNs with State Expansion, arXiv 2404.07904.

    q = silu(x W_q),   f' = x W_f,   v = x W_i
    f_t = lb + (1 - lb) sigmoid(f'_t),   k_t = 1 - f_t                               per channel
    S_t = Diag(f_t) S_(t-1) + k_t v_t^T,   o_t = S_t^T q_t / sqrt(d_k),   y = RMSNorm(concat(o)) W_o
    lb of layer l = sum over m = 1 .. l of softmax(Gamma)_m,  softmax over the L layers; layer 0 has lb = 0

Cached: S (H d d) in fp32, with ``use_short_conv`` the last conv_kernel - 1 inputs of the convolutions. Gamma
(L, D) is one parameter of the model, shared by its layers; layer 0 does not read it. Our choice: log lb and
log(1 - lb) are sums of logs of the softmax, so that no bound rounds to 0 or 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.recurrent import Terms
from attnzoo.attention.site import flag
from attnzoo.attention.stages.combine import FullNorm
from attnzoo.attention.stages.gates import wide
from attnzoo.attention.stages.refine import ShortConv
from attnzoo.cards import Claim
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


class Bounds(nn.Module):
    """Gamma of all layers: their lower bounds come from one softmax."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.Gamma = flag(nn.Parameter(torch.zeros(depth, width)), decay=False, reinit=False)

    def logs(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``log lb`` and ``log(1 - lb)`` of a layer from 1 on, ``(width,)``."""
        share = self.Gamma.to(dtype).log_softmax(0)
        rest = torch.cat([share[:1], share[layer + 1 :]])
        return share[1 : layer + 1].logsumexp(0), rest.logsumexp(0)


class TiedKeys(Stage):
    """Keys from forget logits: ``k = 1 - f``; leaves log f ``(B, G, T, d)`` in ``call.notes``.

    Args:
        bounds: the model's, or None where f has no lower bound.
    """

    rank = 15

    def __init__(self, bounds: Bounds | None, layer: int, kv_heads: int) -> None:
        super().__init__()
        self.bounds, self.layer, self.kv_heads = bounds, layer, kv_heads

    def split(self, share: Share) -> None:
        if self.bounds is not None:
            width = self.bounds.width // self.kv_heads
            share.cut(self.bounds, "Gamma", (self.kv_heads, width), dim=1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        logit = wide(k)
        g, room = F.logsigmoid(logit), F.logsigmoid(-logit)
        if self.bounds is not None:
            low, rest = self.bounds.logs(self.layer, logit.dtype)
            low, rest = (z.unflatten(0, (k.shape[1], 1, -1)) for z in (low, rest))
            g, room = torch.logaddexp(low, rest + g), rest + room
        call.notes["log_forget"] = g
        return F.silu(q), room.exp().to(k.dtype), v


class TiedDecay(Stage):
    """The decay that belongs to the keys of `TiedKeys`."""

    alike = True
    kind = "diagonal"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Terms:
        g = call.notes["log_forget"].transpose(1, 2)
        repeat = k.shape[2] // g.shape[2]
        return Terms(q, k, v, g=g if repeat == 1 else g.repeat_interleave(repeat, dim=2))


@register(
    Card(
        name="hgrn2",
        title="HGRN2",
        paper="HGRN2: Gated Linear RNNs with State Expansion",
        arxiv="2404.07904",
        family="recurrence",
        summary="A recurrence that writes exactly what it makes room for; forgetting fades by depth.",
        cached="the state S (H d d): constant in the length",
        claims=(
            Claim("level with Transformers", "val_bpb", "equal", "mha", "3B"),
            Claim("level with Mamba", where="3B"),
        ),
        small={"chunk_size": 4, "use_short_conv": True},
        layers=3,
    ),
    frames=("recurrent",),
    fixed={"head_dim": "expand_ratio is the width of keys and values alike"},
)
def hgrn2(
    draft: Draft,
    *,
    expand_ratio: int | None = None,
    use_lower_bound: bool = True,
    use_short_conv: bool = False,
    conv_kernel: int = 4,
) -> None:
    """Sets keys, decay and read-out.

    Args:
        expand_ratio: d, width of a head; where given, D / d is the number of heads, whatever num_heads says.
        use_lower_bound: lb as above, else 0. use_short_conv: convolutions without activation.
        layer_idx, num_layers (of the frame): l and L.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: gla's core with k = 1 - f and neither gate nor head norm.
    """
    if expand_ratio is not None:
        if expand_ratio < 1 or draft.dim % expand_ratio:
            raise ValueError(f"expand_ratio: must divide dim={draft.dim}, got {expand_ratio}")
        grouped = draft.num_kv_heads != draft.num_heads
        draft.num_heads = draft.o_heads = draft.dim // expand_ratio
        draft.num_kv_heads = draft.num_kv_heads if grouped else draft.num_heads
        draft.head_dim = draft.v_head_dim = expand_ratio
    if use_short_conv:
        draft.put("refine", ShortConv(list(draft.shapes().values()), conv_kernel, [None] * 3))
    site, bounds, width = draft.site, None, draft.num_kv_heads * draft.head_dim
    if use_lower_bound and site.layer > 0:
        bounds = site.shared(f"hgrn2.bounds.{width}", lambda: Bounds(site.depth, width))
    draft.put("refine", TiedKeys(bounds, site.layer, draft.num_kv_heads))
    draft.put("gates", TiedDecay())
    draft.put("combine", FullNorm(draft.o_heads, draft.v_head_dim, draft.host["norm_eps"]))
