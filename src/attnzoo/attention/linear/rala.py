"""RALA: linear attention whose keys are weighed by their relevance to the mean query, and a gated output.

Breaking the Low-Rank Dilemma of Linear Attention, arXiv 2411.07635. With f = elu + 1, s = d^(-1/2),
q_bar_j = mean_(m <= j) f(q_m), and ~ for rotated:

    frozen:        a_j = exp(e_j),  e_j = s q_bar_j . f(k_j)                    fixed when j is written
    prefix_exact:  a_ij = softmax_(j <= i)(s q_bar_i . f(k_j))                  follows the mean query
    o_i = sum_(j <= i) a (f~(q_i) . f~(k_j)) v_j / (sum_(j <= i) a f(q_i) . f(k_j) + eps)
    y = ((o + conv(v)) * (x W_g + b_g)) W_o + b_o

frozen is a scan: with m_t = max_(j <= t) e_j the state decays by exp(m_(t-1) - m_t) and writes
exp(e_t - m_t) f(k_t) v_t^T.
Cached: S (H d d_v), z (H d), sum f(q) (H d), m (H) in fp32; the values of the last lepe_kernel - 1 tokens.
prefix_exact keeps key features and values instead.
Our choice, since the method is for images: both causal forms; the last row of prefix_exact is that of the
bidirectional layer (without positions). eps 1e-6 is measured against weights a whose largest is 1 (frozen)
or whose mean is 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from attnzoo.attention.base import Choices, Stage, same
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.linear.linear import FeatureMap, plain_sum
from attnzoo.attention.linear.mala import local_terms
from attnzoo.attention.recurrent import NoGates, Terms, scanned
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.mask import Causal
from attnzoo.attention.stages.position import NoPosition, Rope
from attnzoo.attention.stages.running import before, count, running_max, running_sum
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register
from attnzoo_kernels.rows import by_rows
from attnzoo_kernels.scan import scan_flops

EPS = 1e-6


def mean_query(call: Call) -> Tensor:
    """``(B, T, H, d)`` mean of the query features so far, in fp32 at least."""
    q = call.raw.q.transpose(1, 2)
    q = q if q.dtype == torch.float64 else q.float()
    return running_sum(q, call, "q_sum") / count(call, q)[..., None, None]


class Relevance(NoGates):
    """Decay and weights of the keys; leaves both, on unrotated features, to `WeighedSum`."""

    def __init__(self, heads: int, width: int, scale: float) -> None:
        super().__init__()
        self.shape, self.scale = (heads, width), scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Terms:
        features = call.raw.k.transpose(1, 2).to(torch.promote_types(v.dtype, torch.float32))
        features = features.repeat_interleave(self.shape[0] // features.shape[2], dim=2)
        e = self.scale * (mean_query(call).to(features.dtype) * features).sum(-1)
        start = call.mem.state("m")
        start = None if start is None else start.clone()
        # m keeps numbers in range and cancels between numerator and denominator, so that it needs no gradient
        m = running_max(e.detach(), call, "m")
        g = call.line.blank(before(e.detach(), m, call, start) - m)
        weight = call.line.blank((e - m).exp())[..., None]
        call.notes["rala"] = (features * weight, g)
        return Terms(q, k * weight.to(k.dtype), v, g=g)

    def split(self, share: Share) -> None:
        self.shape = (share.count(self.shape[0]), self.shape[1])

    def memory(self) -> dict[str, Slot]:
        return {"q_sum": Slot("state", self.shape), "m": Slot("state", self.shape[:1])}

    def elementwise(self) -> dict[str, float]:
        return {"relevance of keys": 6.0 * self.shape[0] * self.shape[1]}


class WeighedSum(Stage):
    """``o / (f(q) . z + eps)``, z the decayed sum of weighed key features: a scan over values of 1."""

    rank = 10

    def __init__(self, heads: int, width: int, chunk_size: int) -> None:
        super().__init__()
        self.heads, self.width, self.chunk_size = heads, width, chunk_size

    def forward(self, o: Tensor, call: Call) -> Tensor:
        k, g = call.notes["rala"]
        q = call.raw.q.transpose(1, 2).to(k.dtype)
        total = scanned(Terms(q, k, torch.ones_like(k[..., :1]), g), "z", call, 1.0, self.chunk_size)
        return (o.to(k.dtype) / (total + EPS)).to(o.dtype)

    def split(self, share: Share) -> None:
        self.heads = share.count(self.heads)

    def memory(self) -> dict[str, Slot]:
        return {"z": Slot("state", (self.heads, self.width, 1))}

    def work(self, length: int) -> Iterable[Work]:
        run = scan_flops("scalar", length, self.heads, self.width, 1, self.chunk_size).executed
        needed, why = 2 * length * self.heads * self.width, "z by chunks, where q . z is one product"
        yield Work("mixing", "normaliser", needed, run, why, per_head=True)


class PrefixExact(Stage):
    """Scan stage that weighs all keys anew at each query: T x T tables.

    Args:
        shapes: (heads, width) of q, k and v. scale: s. position: rotates cached keys.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]], scale: float, position: NoPosition) -> None:
        super().__init__()
        self.shapes, self.scale, self.position = shapes, scale, position
        self.shape = (*shapes["q"], shapes["v"][1])

    def choose(self, asked: str) -> Choices:
        if asked not in ("auto", "reference"):
            raise ValueError(f"impl: {asked!r} does not run mode=prefix_exact; use auto or reference")
        return same("reference", "T x T tables in plain torch")

    def forward(self, terms: Terms, call: Call) -> Tensor:
        """``(B, T, H, d_v)``."""
        k, v = call.mem.rows("k", call.raw.k), call.mem.rows("v", call.raw.v)
        turned = self.position.turn(k, call.mem.places(), call)
        wide = torch.promote_types(v.dtype, torch.float32)
        groups = self.shapes["q"][0] // k.shape[1]
        k, v, turned = (z.to(wide).repeat_interleave(groups, dim=1) for z in (k, v, turned))
        q, bar = call.raw.q.to(wide), mean_query(call).to(wide).transpose(1, 2) * self.scale
        turned_q, rotates = terms.q.to(wide).transpose(1, 2), self.position.rotates
        eps = (EPS / count(call, q))[:, None, :, None]
        seen = Causal().visible(call.query, call.mem.axis())[:, None]

        def run(rows: slice) -> tuple[Tensor]:
            hidden = ~seen[:, :, rows]
            a = (bar[:, :, rows] @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
            weights = a * (q[:, :, rows] @ k.mT)
            total = weights.sum(-1, keepdim=True)
            if rotates:
                weights = a * (turned_q[:, :, rows] @ turned.mT)
            return (weights @ v / (total + eps[:, :, rows]),)

        with torch.autocast(v.device.type, enabled=False):
            (o,) = by_rows(run, q.shape[2], k.shape[2])
        return o.transpose(1, 2).to(terms.v.dtype)

    def split(self, share: Share) -> None:
        self.shapes = share.shapes(self.shapes)
        self.shape = (*self.shapes["q"], self.shapes["v"][1])

    def memory(self) -> dict[str, Slot]:
        return {
            "k": Slot("rows", self.shapes["k"]),
            "v": Slot("rows", self.shapes["v"]),
            "q_sum": Slot("state", self.shapes["q"]),
        }

    def work(self, length: int) -> Iterable[Work]:
        (heads, width), v_width = self.shapes["q"], self.shapes["v"][1]
        pair = 2 * heads * ((2 + self.position.rotates) * width + v_width)
        visible = length * (length + 1) // 2
        yield Work("mixing", "tables", pair * visible, pair * length**2, "later keys", per_head=True)


@register(
    Card(
        name="rala",
        title="RALA: rank-augmented linear attention",
        paper="Breaking the Low-Rank Dilemma of Linear Attention",
        arxiv="2411.07635",
        family="linear",
        summary="Keys weighed by their relevance to the mean query, and a gated output: more rank.",
        cached="S (H d d_v), its normaliser, the sum of queries, a maximum, the convolution's tail: constant",
        adapted="the paper weighs keys by the mean query of all tokens; here by that of the tokens so far",
        claims=(Claim("RAVLT has 84.4 % top-1 with 26M parameters and 4.6 GFLOPs", where="ImageNet-1k"),),
        small={"chunk_size": 4, "lepe_kernel": 3, "pos": "none"},
    ),
    frames=("recurrent",),
    host={"pos": "rope", "qkv_bias": True, "out_bias": True},
)
def rala(
    draft: Draft,
    *,
    mode: Literal["frozen", "prefix_exact"] = "frozen",
    lepe_kernel: int = 5,
    out_gate: bool = True,
) -> None:
    """Sets feature map, weights of keys, read-out, convolution and gate.

    Args:
        mode: see the module; prefix_exact is quadratic and its cache grows.
        lepe_kernel: taps of the convolution on v; 0 leaves it out.
        out_gate: multiply by x W_g + b_g, without activation.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: linear (normalised), then convolution and gate, where all e_j are equal.
    """
    local = local_terms(draft, lepe_kernel, out_gate)

    def complete(done: Draft) -> None:
        plain_sum(done)
        done.put("refine", FeatureMap("elu1", done.shapes()))
        heads, width, scale, done.scale = done.o_heads, done.head_dim, done.head_dim**-0.5, 1.0
        if mode == "frozen":
            done.put("gates", Relevance(heads, width, scale))
            done.put("combine", WeighedSum(heads, width, done.host["chunk_size"]))
        else:
            rope = done.host["pos"] == "rope"
            turn = lambda: Rope(width, done.host["rope_theta"]) if rope else NoPosition()  # noqa: E731
            done.put("scan", PrefixExact(done.shapes(), scale, done.fill("position", turn)))
        for stage in local(done):
            done.put("combine", stage)

    draft.last(complete)
