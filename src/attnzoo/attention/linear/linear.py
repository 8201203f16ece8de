"""Linear attention: exp(q . k) becomes phi(q) . phi(k), and attention a running sum.

Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention, arXiv 2006.16236.

    S_t = S_(t-1) + phi(k_t) v_t^T,   z_t = z_(t-1) + phi(k_t)
    normalised:    o_t = S_t^T phi(q_t) / (phi(q_t) . z_t + eps)
    unnormalised:  o_t = d_f^(-1/2) S_t^T phi(q_t), then RMSNorm over the head

Cached: S (H d_f d_v) and, normalised, z (H d_f), in fp32, whatever the length. With ``pos=rope`` the rotation
acts after phi on the numerator only: rotated features may be negative, so z sums the unrotated ones.
Maps: elu1 is elu + 1; relu; identity; hedgehog (2402.04347) softmax([2 (W x + b), -2 (W x + b)]), identity W;
t2r (2103.13076) relu(W x); dpfp (2102.11174) r * roll(r, j) of r = [relu(x), relu(-x)], j = 1..nu;
hadamard (W_1 x + b_1) * (W_2 x + b_2).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.combine import HeadNorm
from attnzoo.attention.stages.running import running_sum
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register

SIGNED = ("identity", "hadamard")
LEARNED = {"hedgehog": 1, "t2r": 1, "hadamard": 2}


class FeatureMap(Stage):
    """phi on queries and keys, the learned ones with weights per head and separate for q and k.

    Args:
        kind: see the module; shapes: (heads, width) of q and k; nu: order of dpfp.
    """

    rank = 40

    def __init__(self, kind: str, shapes: dict[str, tuple[int, int]], nu: int = 1) -> None:
        super().__init__()
        self.kind, self.nu, self.shapes = kind, nu, shapes
        for name in ("q", "k"):
            heads, width = shapes[name]
            for i in range(LEARNED.get(kind, 0)):
                start = torch.eye(width).repeat(heads, 1, 1)
                self.register_parameter(f"W_{name}{i}", flag(nn.Parameter(start), reinit=False))
                if kind != "t2r":
                    bias = nn.Parameter(torch.zeros(heads, 1, width))
                    self.register_parameter(f"b_{name}{i}", flag(bias, decay=False, reinit=False))

    @property
    def growth(self) -> int:
        """Feature width over head width."""
        return {"hedgehog": 2, "dpfp": 2 * self.nu}.get(self.kind, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        return self._map("q", q), self._map("k", k), v

    def _map(self, name: str, z: Tensor) -> Tensor:
        if self.kind == "elu1":
            return F.elu(z) + 1
        if self.kind == "relu":
            return z.relu()
        if self.kind == "dpfp":
            r = torch.cat([z.relu(), (-z).relu()], dim=-1)
            return torch.cat([r * r.roll(j, -1) for j in range(1, self.nu + 1)], dim=-1)
        if self.kind == "identity":
            return z
        first = self._affine(name, 0, z)
        if self.kind == "t2r":
            return first.relu()
        if self.kind == "hadamard":
            return first * self._affine(name, 1, z)
        return torch.cat([2 * first, -2 * first], dim=-1).softmax(-1)

    def _affine(self, name: str, i: int, z: Tensor) -> Tensor:
        y = z @ getattr(self, f"W_{name}{i}")
        return y + getattr(self, f"b_{name}{i}") if self.kind != "t2r" else y

    def split(self, share: Share) -> None:
        for name in ("q", "k"):
            for i in range(LEARNED.get(self.kind, 0)):
                share.cut(self, f"W_{name}{i}", (self.shapes[name][0], 1))
                if self.kind != "t2r":
                    share.cut(self, f"b_{name}{i}", (self.shapes[name][0], 1))
        self.shapes = share.shapes(self.shapes)

    def work(self, length: int) -> Iterable[Work]:
        maps = LEARNED.get(self.kind, 0)
        if maps:
            flops = sum(
                2 * maps * length * heads * width**2 for heads, width in (self.shapes["q"], self.shapes["k"])
            )
            yield Work("projections", "feature maps", flops)


class Normaliser(Stage):
    """``o / (phi(q) . z + eps)`` with z the running sum of unrotated key features, in fp32."""

    rank = 10

    def __init__(self, heads: int, kv_heads: int, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width, self.eps = heads, kv_heads, width, eps

    def forward(self, o: Tensor, call: Call) -> Tensor:
        q, k = (z.transpose(1, 2) for z in call.raw[:2])
        wide = torch.float64 if k.dtype == torch.float64 else torch.float32
        z = running_sum(k.to(wide), call, "z").repeat_interleave(self.heads // self.kv_heads, dim=2)
        total = (q.to(wide) * z).sum(-1, keepdim=True)
        return (o.to(wide) / (total + self.eps)).to(o.dtype)

    def split(self, share: Share) -> None:
        self.heads, self.kv_heads = share.count(self.heads), share.count(self.kv_heads)

    def memory(self) -> dict[str, Slot]:
        return {"z": Slot("state", (self.kv_heads, self.width))}

    def elementwise(self) -> dict[str, float]:
        return {"normaliser": 3.0 * self.heads * self.width}


def plain_sum(draft: Draft, whole: bool = True) -> None:
    """Claims the sum over the past, whose weights the read-out knows, for one variant of a composition.

    Args:
        whole: the read-out divides by the sum of these very weights, so nothing else may change or divide it.
    """
    reader = draft.current
    others = [("gates", "gates it")] + [("scan", "sums otherwise")] * whole

    def refuse(owner: str, does: str) -> None:
        if owner != reader:
            raise ValueError(f"add: {reader} reads a plain sum, {owner} {does}; leave one of them out")

    def settled(done: Draft) -> None:
        for slot, does in others:
            refuse(done.owner.get(slot, reader), does)

    settled(draft)
    if whole:
        refuse(draft.owner.get("sum", reader), "reads it its own way")
        draft.owner["sum"] = reader
    draft.very_last(settled)


@register(
    Card(
        name="linear",
        title="Linear attention",
        paper="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        arxiv="2006.16236",
        family="linear",
        summary="exp(q . k) becomes phi(q) . phi(k), and attention a running sum.",
        cached="the state S (H d_f d) and its normaliser z (H d_f): constant in the length",
        claims=(
            Claim(
                "generation thousands of times faster", "decode_ms", "lower", "mha", "autoregressive images"
            ),
            Claim("clearly behind softmax", "val_bpb", "higher", "mha", "language"),
        ),
        small={"chunk_size": 4},
    ),
    frames=("recurrent",),
    host={"pos": "rope"},
)
def linear(
    draft: Draft,
    *,
    feature_map: Literal["elu1", "relu", "identity", "hedgehog", "t2r", "dpfp", "hadamard"] = "elu1",
    normalize: bool = True,
    nu: int = 1,
) -> None:
    """Sets feature map and read-out.

    Args:
        feature_map: phi, see the module. nu: order of dpfp.
        normalize: divide by the sum of weights (maps that are never negative only), else scale and norm per
            head.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: kernel attention with weights phi(q) . phi(k), quadratic == recurrent == chunked.
    """
    if normalize and feature_map in SIGNED:
        raise ValueError(
            f"normalize: the weights of feature_map={feature_map} can be negative, got normalize=true; "
            "set normalize=false"
        )
    if nu < 1:
        raise ValueError(f"nu: must be at least 1, got {nu}")

    def complete(done: Draft) -> None:
        plain_sum(done, whole=normalize)
        phi = FeatureMap(feature_map, done.shapes(), nu)
        done.put("refine", phi)
        # the projection keeps the head's width, everything after the map sees the features'
        done.project_width, done.head_dim = done.project_width or done.head_dim, done.head_dim * phi.growth
        if normalize:
            done.scale = 1.0
            done.put("combine", Normaliser(done.o_heads, done.num_kv_heads, done.head_dim))
        else:
            done.put("combine", HeadNorm(done.v_head_dim, done.host["norm_eps"]))

    wider = feature_map in ("hedgehog", "dpfp")
    (draft.before_others if wider else draft.last)(complete)
