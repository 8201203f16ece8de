"""FLARE: a few learned latents per head gather from all tokens, and every token reads the latents.

FLARE: Fast Low-rank Attention Routing Engine, arXiv 2508.12594; the causal form after the author's note on
decoders.

    k, v = K(x), V(x)             linear with bias, or a residual MLP; no W_q
    s_tm = Q_m . k_t              M latents Q of each head, scale 1; the same scores gather and scatter
    Z^t_m = sum_(j <= t) exp(s_jm) v_j / sum_(j <= t) exp(s_jm)
    y_t   = sum_m softmax_m(s_t)_m Z^t_m
    as a scan over M slots:  l_t = logaddexp(l_(t-1), s_t),  decay exp(l_(t-1) - l_t),
                             key exp(s_t - l_t),  query softmax_m(s_t)

Cached: Z (H M d_v) and l (H M) in fp32, whatever the length, and the tails of the convolutions. Our choice:
short causal convolutions on k and v, without activation, because nothing else knows the order; where a
composition maps or turns queries, the reader's scores come from the mapped ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.recurrent import Scan, Terms
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.position import Rope
from attnzoo.attention.stages.refine import causal_conv
from attnzoo.attention.stages.running import before, running_logsumexp
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.ops.cumulative import softmax_steps
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


class KeysValues(Stage):
    """Keys and values, the keys again where queries are expected.

    Args:
        depth: hidden layers of the residual MLP that makes each; -1 = one linear map.
        taps: of the convolutions; 0 = none. bias: of the linear maps.
    """

    def __init__(self, draft: Draft, depth: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.depth, self.taps = draft.num_heads, draft.num_kv_heads, depth, taps
        self.widths = {"k": self.groups * draft.head_dim, "v": self.groups * draft.v_head_dim}
        self.dim = draft.dim
        self.mine = dict.fromkeys("kv", slice(None))  # channels of this rank
        for side, width in self.widths.items():
            sizes = [self.dim] * (depth + 2) + [width] if depth >= 0 else [self.dim, width]
            layers = [
                draft.linear(side if depth < 0 else f"{side}{i}", a, b, bias)
                for i, (a, b) in enumerate(pairwise(sizes))
            ]
            self.add_module(side, nn.ModuleList(layers))
            if taps:
                start = torch.empty(width, taps).uniform_(-1, 1) / math.sqrt(taps)
                self.register_parameter(f"conv_{side}", flag(nn.Parameter(start), decay=False, reinit=False))

    def qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """x ``(B, T, D)`` -> q ``(B, H, T, d)``, k and v ``(B, G, T, d)``."""
        k, v = (self._one(side, x, call) for side in "kv")
        q = k if self.groups == self.heads else k.repeat_interleave(self.heads // self.groups, dim=1)
        return q, k, v

    def _one(self, side: str, x: Tensor, call: Call) -> Tensor:
        *hidden, last = getattr(self, side)
        h = x
        for layer in hidden:
            h = h + F.gelu(layer(h), approximate="tanh")
        h = h[..., self.mine[side]] + last(h) if self.depth >= 0 else last(h)
        if self.taps:
            h = causal_conv(h, getattr(self, f"conv_{side}"), call, f"conv_{side}")
        return h.unflatten(-1, (self.groups, -1)).transpose(1, 2)

    def split(self, share: Share) -> None:
        own = share.part(self.groups)
        for side, width in self.widths.items():
            d = width // self.groups
            share.rows(getattr(self, side)[-1], (self.groups, d))
            if self.taps:
                share.cut(self, f"conv_{side}", (self.groups, d))
            self.mine[side] = slice(own.first * d, (own.first + own.count) * d)
            self.widths[side] = own.count * d
        self.heads, self.groups = share.count(self.heads), own.count
        share.keep(self)

    def memory(self) -> dict[str, Slot]:
        if not self.taps:
            return {}
        return {f"conv_{s}": Slot("tail", (self.taps - 1, width)) for s, width in self.widths.items()}

    def work(self, length: int) -> Iterable[Work]:
        for side, width in self.widths.items():
            flops = 2 * length * self.dim * (width + (self.depth + 1) * self.dim)
            yield Work("projections", f"W_{side}", flops)

    def elementwise(self) -> dict[str, float]:
        return {"short convolutions": 2.0 * self.taps * sum(self.widths.values())}


class Latents(Stage):
    """Scores against the latents, and what they ask of the scan.

    Args:
        slots: of the draft, in which later variants may put what changes queries.
    """

    kind = "diagonal"

    def __init__(self, draft: Draft, count: int, scale: float, slots: dict[str, Any]) -> None:
        super().__init__()
        self.shape, self.scale, self.slots = (draft.o_heads, count, draft.head_dim), scale, slots
        self.Q = flag(nn.Parameter(0.1 * torch.randn(self.shape)), reinit=False)

    @property
    def once(self) -> bool:
        """Whether readers and writers have the same scores."""
        return not self.slots["refine"] and not self.slots["position"].rotates

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Terms:
        wide = torch.float64 if k.dtype == torch.float64 else torch.float32
        s = self._scores(k).to(wide)  # (B, T, H, M)
        read = s if self.once else self._scores(q).to(wide)
        if call.mem.alone and call.line.doc is None and call.line.valid is None:
            g, write = softmax_steps(s)
            return Terms(read.softmax(-1), write, v, g=g)
        start = call.mem.state("lse")
        start = None if start is None else start.clone()
        total = call.line.blank(running_logsumexp(s, call, "lse"))
        g = (before(s, total, call, start) - total).clamp(max=0)
        return Terms(read.softmax(-1), (call.line.blank(s) - total).exp(), v, g=g)

    def _scores(self, z: Tensor) -> Tensor:
        """``(B, T, H, d)`` -> ``(B, T, H, M)``."""
        return (z.transpose(1, 2) @ (self.Q * self.scale).mT).transpose(1, 2)

    def split(self, share: Share) -> None:
        share.cut(self, "Q", (self.shape[0], 1))
        self.shape = (share.count(self.shape[0]), *self.shape[1:])

    def memory(self) -> dict[str, Slot]:
        return {"lse": Slot("state", self.shape[:2])}

    def work(self, length: int) -> Iterable[Work]:
        flops = 2 * length * math.prod(self.shape)
        yield Work("mixing", "scores of latents", flops if self.once else 2 * flops, per_head=True)

    def elementwise(self) -> dict[str, float]:
        return {"running log-sum-exp and softmax": 8.0 * self.shape[0] * self.shape[1]}


@register(
    Card(
        name="flare",
        title="Fast low-rank attention routing engine",
        paper="FLARE: Fast Low-rank Attention Routing Engine",
        arxiv="2508.12594",
        family="linear",
        summary="Learned latents gather from the prefix, and every token reads them by the same scores.",
        cached="Z (H M d_v), its log-sum-exps (H M) and convolution tails: constant in the length",
        adapted="the paper's latents gather from all tokens; here from the tokens so far",
        claims=(
            Claim(
                "more than 200 x faster than full attention; no language results",
                where="a million mesh points",
            ),
        ),
        small={"num_latents": 6, "kv_mlp_depth": 1, "chunk_size": 4},
    ),
    frames=("recurrent",),
    host={"qkv_bias": True, "out_bias": True},
)
def flare(
    draft: Draft,
    *,
    num_latents: int = 64,
    kv_mlp_depth: int = -1,
    attn_scale: float = 1.0,
    short_conv: bool = True,
    conv_kernel: int = 4,
) -> None:
    """Sets projection, gates and scan.

    Args:
        num_latents: M, at least 1 (32 to 256 in the paper).
        kv_mlp_depth: hidden layers of the residual MLPs for k and v; -1 = linear; the paper has 3.
        attn_scale: factor of the scores, positive. short_conv: the convolutions; conv_kernel: their taps.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: the mean of all v so far, weighted by one softmax, with num_latents=1; two nested softmaxes.
    """
    for name, value in (("num_latents", num_latents), ("conv_kernel", conv_kernel)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    if kv_mlp_depth < -1:
        raise ValueError(f"kv_mlp_depth: must be at least 0, or -1 for a linear map, got {kv_mlp_depth}")
    if attn_scale <= 0:
        raise ValueError(f"attn_scale: must be positive, got {attn_scale}")
    host = draft.host

    def complete(done: Draft) -> None:
        if kv_mlp_depth >= 0 and done.num_kv_heads * done.head_dim != done.dim:
            raise ValueError(
                f"kv_mlp_depth: a residual MLP keeps the width dim={done.dim}, got depth {kv_mlp_depth} with "
                f"{done.num_kv_heads} heads of {done.head_dim}; set kv_mlp_depth=-1"
            )
        taps = conv_kernel if short_conv else 0
        done.put("project", KeysValues(done, kv_mlp_depth, taps, host["qkv_bias"]))
        if host["pos"] == "rope":
            done.fill("position", lambda: Rope(done.head_dim, host["rope_theta"]))
        done.put("gates", Latents(done, num_latents, attn_scale, done.slots))
        scan = Scan(done.o_heads, num_latents, done.v_head_dim, host["chunk_size"], 1.0, Latents.kind)
        done.put("scan", scan)

    draft.last(complete)
