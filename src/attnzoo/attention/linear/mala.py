"""MALA: linear attention that scales up and subtracts the mean, so that large queries sharpen their weights.

Rectifying Magnitude Neglect in Linear Attention, arXiv 2507.00698. With f = elu + 1, s = d^(-1/2), ~ rotated:

    mean:  z_i = s f(q_i) . mean_(j <= i) f(k_j)
           o_i = (1 + 1 / (z_i + 1e-6)) (s / i) sum_(j <= i) (f~(q_i) . f~(k_j)) v_j - z_i mean_(j <= i) v_j
    sum:   Z_i = f(q_i) . sum_(j <= i) f(k_j)
           o_i = (1 + 1 / (Z_i + 1e-6)) sum_(j <= i) (f~(q_i) . f~(k_j)) v_j - (Z_i / i) sum_(j <= i) v_j
    y = ((o + conv(v)) * (x W_g + b_g)) W_o + b_o

Cached: S (H d d_v), sum f(k) (H d), sum v (H d_v) in fp32; the values of the last lepe_kernel - 1 tokens.
Our choice, since the method is for images: all sums and means are those of the prefix, the convolution looks
back only. mean is the released code's form, sum the paper's; sum grows with i and wants a short context.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.linear.linear import FeatureMap, plain_sum
from attnzoo.attention.recurrent import NoGates, Terms
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.combine import Gate, LocalConv
from attnzoo.attention.stages.running import count, running_sum
from attnzoo.cards import Claim
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


class Unrounded(NoGates):
    """No gates; values in fp32 at least, since the read-out takes a difference of large means."""

    alike = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Terms:
        return Terms(q, k, v if v.dtype == torch.float64 else v.float())


class Magnitude(Stage):
    """``(1 + 1 / z) o - z mean(v)``, from running sums of key features and values.

    Args:
        shapes: (heads, width) of q, k and v. scale: s. mean: the form with means, else with sums.
    """

    rank = 10

    def __init__(self, shapes: dict[str, tuple[int, int]], scale: float, mean: bool) -> None:
        super().__init__()
        self.shapes, self.scale, self.mean, self.eps = shapes, scale, mean, 1e-6

    def forward(self, o: Tensor, call: Call) -> Tensor:
        """``o`` is the scan's sum, already times s in the form with means."""
        heads, wide = self.shapes["q"][0], o.dtype
        q, k, v = (z.transpose(1, 2) for z in call.raw)
        sums = (running_sum(z.to(wide), call, slot) for z, slot in ((k, "k_sum"), (v, "v_sum")))
        k, v = (z.repeat_interleave(heads // z.shape[2], dim=2) for z in sums)
        n = count(call, o)[..., None, None]
        z = (q.to(wide) * k).sum(-1, keepdim=True)
        if self.mean:
            z, o = z * (self.scale / n), o / n
        return ((1 + 1 / (z + self.eps)) * o - z / n * v).to(call.raw.v.dtype)

    def split(self, share: Share) -> None:
        self.shapes = share.shapes(self.shapes)

    def memory(self) -> dict[str, Slot]:
        return {"k_sum": Slot("state", self.shapes["k"]), "v_sum": Slot("state", self.shapes["v"])}

    def elementwise(self) -> dict[str, float]:
        heads, width = self.shapes["q"]
        return {"magnitude": heads * (3.0 * width + 5.0 * self.shapes["v"][1])}


@register(
    Card(
        name="mala",
        title="MALA: magnitude-aware linear attention",
        paper="Rectifying Magnitude Neglect in Linear Attention",
        arxiv="2507.00698",
        family="linear",
        summary="Linear attention that scales up and subtracts the mean: large queries sharpen weights.",
        cached="the state S (H d d_v), sums of key features and values, and the convolution's tail: constant",
        adapted="the paper's means run over all tokens; here over the tokens so far",
        claims=(
            Claim("above earlier linear attention", where="image classification, detection and segmentation"),
        ),
        small={"chunk_size": 4, "lepe_kernel": 3, "mala_norm": "sum"},
    ),
    frames=("recurrent",),
    host={"pos": "rope", "qkv_bias": True, "out_bias": True},
)
def mala(
    draft: Draft,
    *,
    mala_norm: Literal["mean", "sum"] = "mean",
    lepe_kernel: int = 5,
    out_gate: bool = True,
) -> None:
    """Sets feature map, read-out, convolution and gate.

    Args:
        mala_norm: see the module. lepe_kernel: taps of the convolution on v; 0 leaves it out.
        out_gate: multiply by x W_g + b_g, without activation.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: normalised linear attention plus s f(q) . Cov_(j <= i)(f(k), v), without positions,
        convolution and gate; weights then sum to 1 and may be negative.
    """
    local = local_terms(draft, lepe_kernel, out_gate)

    def complete(done: Draft) -> None:
        plain_sum(done)
        done.put("refine", FeatureMap("elu1", done.shapes()))
        done.put("gates", Unrounded())
        scale = done.head_dim**-0.5
        done.scale = scale if mala_norm == "mean" else 1.0
        done.put("combine", Magnitude(done.shapes(), scale, mala_norm == "mean"))
        for stage in local(done):
            done.put("combine", stage)

    draft.last(complete)


def local_terms(draft: Draft, lepe_kernel: int, out_gate: bool):
    """What puts the convolution on v and the linear output gate of these image models, once shapes are known.

    Raises:
        ValueError: ``lepe_kernel`` < 0.
    """
    if lepe_kernel < 0:
        raise ValueError(f"lepe_kernel: must be at least 0 (no convolution), got {lepe_kernel}")

    def make(done: Draft) -> Iterable[Stage]:
        if lepe_kernel:
            yield LocalConv(done.shapes()["v"], lepe_kernel)
        if out_gate:
            yield Gate(done.site, done.dim, done.o_heads, done.v_head_dim, as_it_is, bias=True)

    return make


def as_it_is(gate: Tensor) -> Tensor:
    """A gate without activation."""
    return gate
