"""L2ViT: layers of windowed softmax attention alternate with ReLU linear attention that is then sharpened.

The Linear Attention Resurrection in Vision Transformer, arXiv 2501.16182.

    both:    x' = x + DWConv3(x)
    window:  softmax attention on x' in a window, no shift
    linear:  q, k = relu(q), relu(k),   S_t = S_(t-1) + k_t v_t^T,   z_t = z_(t-1) + k_t
             o_t = tau_h S_t^T q_t / max(q_t . z_t, delta),   y = concat_h(o) W_o
             y + LCM(LayerNorm(residual + y)),   LCM = DWConv7 -> GELU -> RMSNorm -> DWConv7

Cached: window layers a ring of k, v; linear layers S (H d d_v) and z (H d) in fp32; tails of convolutions.
Our choice: convolutions look back only; RMSNorm in place of the released BatchNorm, whose statistics would
mix later tokens and other documents; the second residual branch is inside y; delta = 1 (released: 100, which
damps the first few hundred tokens); positions come from the convolution, ``pos=rope`` adds a rotation. The
last convolution starts as small as an output projection: with a convolution's usual taps the branch is louder
than the stream at the start, and a small language model learns far less.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.linear.linear import FeatureMap, Normaliser, plain_sum
from attnzoo.attention.site import Site, flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.mask import Blocks, Causal, Static
from attnzoo.attention.stages.project import QKV
from attnzoo.attention.stages.refine import causal_conv
from attnzoo.attention.stages.running import running_sum
from attnzoo.cards import Claim
from attnzoo.ops.fused import rms_norm
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


def _taps(channels: int, size: int) -> nn.Parameter:
    start = torch.empty(channels, size).uniform_(-1, 1) / math.sqrt(size)
    return flag(nn.Parameter(start), decay=False, reinit=False)


class Placed(QKV):
    """The projection of x plus a short causal convolution of it."""

    def __init__(self, draft: Draft, taps: int, stores: bool) -> None:
        G, d, d_v = draft.num_kv_heads, draft.head_dim, draft.v_head_dim
        v_heads, bias = draft.shapes()["v"][0], draft.host["qkv_bias"]
        super().__init__(draft.site, draft.dim, draft.num_heads, G, d, d_v, bias, stores, v_heads)
        self.place = _taps(draft.dim, taps)

    def qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        return super().qkv(x + causal_conv(x, self.place, call, "place"), call)

    def split(self, share: Share) -> None:
        super().split(share)
        share.keep(self)

    def memory(self) -> dict[str, Slot]:
        dim, taps = self.place.shape
        return super().memory() | {"place": Slot("tail", (taps - 1, dim))}

    def elementwise(self) -> dict[str, float]:
        return {"position convolution": 2.0 * self.place.numel()}


class Floored(Normaliser):
    """``tau_h o / max(q . z, delta)``."""

    def __init__(self, heads: int, kv_heads: int, width: int, delta: float) -> None:
        super().__init__(heads, kv_heads, width, delta)
        self.tau = flag(nn.Parameter(torch.full((heads,), width**-0.5)), decay=False, reinit=False)

    def split(self, share: Share) -> None:
        share.cut(self, "tau", (self.heads, 1))
        super().split(share)

    def forward(self, o: Tensor, call: Call) -> Tensor:
        q, k = (z.transpose(1, 2) for z in call.raw[:2])
        wide = torch.float64 if k.dtype == torch.float64 else torch.float32
        z = running_sum(k.to(wide), call, "z").repeat_interleave(self.heads // self.kv_heads, dim=2)
        total = (q.to(wide) * z).sum(-1).clamp(min=self.eps)
        return (o.to(wide) * (self.tau.to(wide) / total)[..., None]).to(o.dtype)


class Concentration(Stage):
    """``y + LCM(LayerNorm(residual + y))``: what linear attention spreads is gathered again locally."""

    def __init__(self, site: Site, dim: int, taps: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.ln_gain = flag(nn.Parameter(torch.ones(dim)), decay=False)
        self.ln_bias = flag(nn.Parameter(torch.zeros(dim)), decay=False)
        self.mid_gain = flag(nn.Parameter(torch.ones(dim)), decay=False)
        self.first = _taps(dim, taps)
        # what leaves the branch starts as small as an output projection's, or it drowns the stream
        start = torch.randn(dim, taps) * site.out_std
        self.second = flag(nn.Parameter(start), decay=False, reinit=False)

    def forward(self, y: Tensor, call: Call) -> Tensor:
        z = F.layer_norm(call.residual + y, y.shape[-1:], self.ln_gain, self.ln_bias, self.eps)
        z = F.gelu(causal_conv(z, self.first, call, "first"))
        return y + causal_conv(rms_norm(z, self.mid_gain, self.eps), self.second, call, "second")

    def memory(self) -> dict[str, Slot]:
        dim, taps = self.first.shape
        return {name: Slot("tail", (taps - 1, dim)) for name in ("first", "second")}

    def elementwise(self) -> dict[str, float]:
        return {"local concentration": 4.0 * self.first.numel()}


def _choose(site: Site, *, layer_pattern: tuple[str, ...], **_: object) -> str:
    kind = layer_pattern[site.layer % len(layer_pattern)] if layer_pattern else ""
    return {"window": "score", "linear": "recurrent"}.get(kind, "score")


@register(
    Card(
        name="l2vit",
        title="L2ViT: enhanced linear attention and windows",
        paper="The Linear Attention Resurrection in Vision Transformer",
        arxiv="2501.16182",
        family="linear",
        summary="Windowed softmax layers alternate with ReLU linear attention and a local branch.",
        cached="window layers: a ring of k, v; linear layers: S, z; tails of convolutions",
        adapted="the paper sums and convolves both ways and norms over the batch; here over the past",
        claims=(Claim("84.4 % top-1, 87.0 % with ImageNet-22k at 384^2", where="ImageNet-1k"),),
        small={
            "layer_idx": 1,
            "num_layers": 2,
            "window": 5,
            "chunk_size": 4,
            "lcm_kernel": 3,
            "denom_min": 0.4,
        },
        layers=2,
    ),
    frames=("score", "recurrent"),
    choose=_choose,
    host={"pos": "none", "qkv_bias": True, "out_bias": True, "window": 128},
)
def l2vit(
    draft: Draft,
    *,
    layer_pattern: tuple[str, ...] = ("window", "linear"),
    window_mode: Literal["sliding", "block"] = "sliding",
    lcm_kernel: int = 7,
    cpe_kernel: int = 3,
    denom_min: float = 1.0,
) -> None:
    """Sets projection, mask and, in linear layers, feature map, denominator and the branch after.

    Args:
        layer_pattern: of "window" and "linear", repeated over the layers.
        window_mode: the last ``window`` tokens, or fixed blocks of them inside the document.
        lcm_kernel, cpe_kernel: taps of the branch and of the position convolution; 0 leaves them out.
        denom_min: delta, positive.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: linear with feature_map=relu as delta goes to 0 with tau = 1 and no convolutions; mha without
        positions where window >= T and there is no convolution.
    """
    host, kind = draft.host, _choose(draft.site, layer_pattern=layer_pattern)
    for i, name in enumerate(layer_pattern):
        if name not in ("window", "linear"):
            raise ValueError(f"layer_pattern[{i}]: must be 'window' or 'linear', got {name!r}")
    if not layer_pattern:
        raise ValueError("layer_pattern: must name at least one layer, got ()")
    for name, value in (("lcm_kernel", lcm_kernel), ("cpe_kernel", cpe_kernel)):
        if value < 0:
            raise ValueError(f"{name}: must be at least 1, or 0 to leave it out, got {value}")
    if denom_min <= 0:
        raise ValueError(f"denom_min: the denominator needs a positive floor, got {denom_min}")
    if kind == "score" and window_mode == "block":
        if not host["window"] or host["window"] < 1 or host["n_sink"]:
            raise ValueError(
                "window: blocks need a size of at least 1 and have no sinks, got "
                f"window={host['window']}, n_sink={host['n_sink']}; set window_mode=sliding"
            )
        draft.put("mask", Static(Causal() & Blocks(host["window"])))

    def complete(done: Draft) -> None:
        if cpe_kernel:
            done.put("project", Placed(done, cpe_kernel, stores=kind == "score"))
        if kind == "score":
            return
        plain_sum(done)
        done.scale = 1.0
        done.put("refine", FeatureMap("relu", done.shapes()))
        done.put("combine", Floored(done.o_heads, done.num_kv_heads, done.head_dim, denom_min))

    draft.last(complete)
    if kind == "recurrent" and lcm_kernel:
        draft.put("after", Concentration(draft.site, draft.dim, lcm_kernel, host["norm_eps"]))
