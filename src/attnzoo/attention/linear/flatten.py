"""FLatten: linear attention whose features are sharpened by a power that keeps their norm.

FLatten Transformer: Vision Transformer using Focused Linear Attention, arXiv 2308.00442.

    r(z) = (relu(z) + 1e-6) / softplus(s),   f(z) = |r| r^p / |r^p|       norms over all heads, or per head
    o_i = sum_(j <= i) (f(q_i) . f(k_j)) v_j / (f(q_i) . sum_(j <= i) f(k_j) + 1e-6)
    y = (o + conv(v)) W_o + b_o

Cached: S (H d d_v) and z (H d) in fp32, and the values of the last kernel_size - 1 tokens.
Our choice, since the method is for images: prefix sums; the convolution sees the token and those before it;
rotary positions on the numerator in place of the learned table, which learned_pos brings back (on keys, by
place in the document). Under grouped heads s belongs to key heads and their query heads use it too.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.linear.linear import Normaliser, plain_sum
from attnzoo.attention.site import flag
from attnzoo.attention.stages.combine import LocalConv
from attnzoo.cards import Claim
from attnzoo.parallel.tensor import CannotSplit, Share
from attnzoo.registry import Card, register


class Focus(Stage):
    """The focused map on queries and keys.

    Args:
        shapes: (heads, width) of q and k. power: p. per_head: norms over each head, not over all of them.
    """

    rank = 40

    def __init__(self, shapes: dict[str, tuple[int, int]], power: float, per_head: bool) -> None:
        super().__init__()
        self.power, self.per_head = power, per_head
        self.groups = shapes["q"][0] // shapes["k"][0]
        self.s = flag(nn.Parameter(torch.zeros(shapes["k"])), decay=False, reinit=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        scale = F.softplus(self.s)[:, None]  # (G, 1, d)
        return self._focus(q, scale.repeat_interleave(self.groups, dim=0)), self._focus(k, scale), v

    def split(self, share: Share) -> None:
        if not self.per_head and self.power != 1:
            raise CannotSplit("its norms are of all heads together")
        share.cut(self, "s", (len(self.s), 1))

    def _focus(self, z: Tensor, scale: Tensor) -> Tensor:
        """``z`` ``(B, heads, T, d)``."""
        wide = z if z.dtype == torch.float64 else z.float()
        r = (wide.relu() + 1e-6) / scale.to(wide.dtype)
        if self.power == 1:
            return r.to(z.dtype)
        axes = (3,) if self.per_head else (1, 3)
        top = r.amax(axes, keepdim=True)  # a large power of a large number overflows
        sharp = (r / top) ** self.power
        norms = [(n * n).sum(axes, keepdim=True).sqrt() for n in (r / top, sharp)]
        return (sharp * (top * norms[0] / norms[1])).to(z.dtype)


class KeyTable(Stage):
    """Keys plus a learned vector for their place in the document, before the feature map."""

    rank = 5

    def __init__(self, kv_heads: int, width: int, max_len: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(max_len, kv_heads, width))
        nn.init.trunc_normal_(self.table, std=0.02)

    def split(self, share: Share) -> None:
        share.cut(self, "table", (self.table.shape[1], 1), dim=1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        place = call.line.place(len(self.table), "max_seq_len")
        return q, k + self.table[place].transpose(1, 2).to(k.dtype), v


@register(
    Card(
        name="flatten",
        title="FLatten: focused linear attention",
        paper="FLatten Transformer: Vision Transformer using Focused Linear Attention",
        arxiv="2308.00442",
        family="linear",
        summary="Linear attention on features sharpened by a norm-preserving power, and a convolution on v.",
        cached="the state S (H d d_v), its normaliser z (H d) and the convolution's tail: constant",
        adapted="the paper sums over all tokens and convolves both ways; here prefix sums and past taps",
        claims=(Claim("top-1 of PVT-T 77.8 against 75.1, of Swin-T 82.1 against 81.3", where="ImageNet"),),
        small={"chunk_size": 4, "kernel_size": 3, "learned_pos": True},
    ),
    frames=("recurrent",),
    host={"pos": "rope", "qkv_bias": True, "out_bias": True},
)
def flatten(
    draft: Draft,
    *,
    focusing_factor: float = 3,
    kernel_size: int = 5,
    norm_scope: Literal["model", "head"] = "model",
    learned_pos: bool = False,
) -> None:
    """Sets feature map, normaliser and convolution.

    Args:
        focusing_factor: p, at least 1. kernel_size: taps of the convolution on v; 0 leaves it out.
        norm_scope: norms of the map over all heads together, or per head.
        learned_pos: a learned table on keys, for documents up to max_seq_len.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: linear with relu features, at p = 1 with silent taps (up to 1e-6 and the factor 1 / softplus).
    """
    if focusing_factor < 1:
        raise ValueError(f"focusing_factor: must be at least 1, got {focusing_factor}")
    if kernel_size < 0:
        raise ValueError(f"kernel_size: must be at least 0 (no convolution), got {kernel_size}")

    def complete(done: Draft) -> None:
        plain_sum(done)
        shapes = done.shapes()
        if learned_pos:
            done.put("refine", KeyTable(*done.shapes(projected=True)["k"], done.site.max_len))
        done.put("refine", Focus(shapes, focusing_factor, norm_scope == "head"))
        done.scale = 1.0
        done.put("combine", Normaliser(done.o_heads, done.num_kv_heads, done.head_dim))
        if kernel_size:
            done.put("combine", LocalConv(shapes["v"], kernel_size, shared=True, field="kernel_size"))

    draft.last(complete)
