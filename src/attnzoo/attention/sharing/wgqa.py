"""Weighted GQA: all H key and value heads stay parameters, and each group learns how to sum its heads.

Weighted Grouped Query Attention in Transformers, arXiv 2407.10855.

    K~_g = sum_(h in group g) w^k_h * W_k,h,   V~_g = sum_(h in group g) w^v_h * W_v,h
    scalar: w_h a number;   row: w_h (D) scales input features;   col: w_h (d) scales head channels
    then gqa with W_k = [K~_1 .. K~_G], W_v = [V~_1 .. V~_G]

The sum is over weights, once per forward, so RoPE and all that follows is plain gqa; `merge` writes it down.
Cached: k (after RoPE) and v, 2 G d per token. Our choice: the weights are not decayed; biases are summed with
the mean of w_h. The released code starts at 0.5, which is the mean for groups of two only; here it is G / H.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Mixer
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft, set_heads
from attnzoo.attention.site import flag
from attnzoo.attention.stages.project import QKV, largest_divisor
from attnzoo.cards import Claim
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register

SHAPES = {"scalar": lambda D, d: (), "row": lambda D, d: (D,), "col": lambda D, d: (d,)}


class WeightedKV(QKV):
    """`QKV` whose G key and value heads are weighted sums of H in the weights.

    Args:
        draft: gives H, G and the widths. kind: "scalar", "row" or "col"; start: "mean" or "random".
        stores: as in `QKV`.
    """

    def __init__(self, draft: Draft, kind: str, start: str, stores: bool = True) -> None:
        H, width = draft.num_heads, draft.project_width or draft.head_dim
        bias = draft.host["qkv_bias"]
        super().__init__(draft.site, draft.dim, H, H, width, draft.v_head_dim, bias, stores)
        self.kind, groups = kind, draft.num_kv_heads
        self.group_size = H // groups  # heads of a group
        for name, d in (("k_weights", width), ("v_weights", draft.v_head_dim)):
            shape = (H, *SHAPES[kind](draft.dim, d))
            value = torch.full(shape, groups / H) if start == "mean" else torch.randn(shape)
            self.register_parameter(name, flag(nn.Parameter(value), decay=False, reinit=False))
        # from here on, what comes out: G heads
        self.parts, self.heads = list(self.sizes), (H, groups, groups)
        self.sizes = [h * d for h, d in zip(self.heads, self.widths, strict=True)]

    def qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """As `QKV.qkv`."""
        weight, bias = self.merged()
        parts = F.linear(x, weight, bias).split(self.sizes, dim=-1)
        return tuple(
            z.unflatten(-1, (h, d)).transpose(1, 2)
            for z, h, d in zip(parts, self.heads, self.widths, strict=True)
        )

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the plain projection ``[W_q | K~ | V~]``."""
        q, k, v = self.qkv_proj.weight.split(self.parts)
        weight = torch.cat([q, self._sum(k, self.k_weights), self._sum(v, self.v_weights)])
        if self.qkv_proj.bias is None:
            return weight, None
        q, k, v = self.qkv_proj.bias.split(self.parts)
        return weight, torch.cat([q, self._sum_bias(k, self.k_weights), self._sum_bias(v, self.v_weights)])

    def _sum(self, blocks: Tensor, w: Tensor) -> Tensor:
        """``(H d, D)`` -> ``(G d, D)``; products of matrices whatever the kind, so that costs are counted."""
        G, D = self.heads[1], blocks.shape[1]
        blocks = blocks.unflatten(0, (G, self.group_size, -1))  # (G, m, d, D)
        w = w.unflatten(0, (G, -1))
        if self.kind == "scalar":
            return (w[:, None] @ blocks.flatten(2)).reshape(-1, D)
        if self.kind == "col":  # per group and channel, (1, m) @ (m, D)
            return (w.permute(0, 2, 1)[:, :, None] @ blocks.transpose(1, 2)).reshape(-1, D)
        # per group and input, (1, m) @ (m, d)
        return (w.permute(0, 2, 1)[:, :, None] @ blocks.permute(0, 3, 1, 2))[:, :, 0].mT.reshape(-1, D)

    def _sum_bias(self, blocks: Tensor, w: Tensor) -> Tensor:
        G = self.heads[1]
        blocks = blocks.unflatten(0, (G, self.group_size, -1))  # (G, m, d)
        w = w[:, None] if self.kind == "scalar" else w.mean(1, keepdim=True) if self.kind == "row" else w
        return (w.unflatten(0, (G, -1)) * blocks).sum(1).flatten()

    def split(self, share: Share) -> None:
        """Groups whole, since their members are summed."""
        (H, G, _), m, (d, _, d_v) = self.heads, self.group_size, self.widths
        share.rows(self.qkv_proj, (H, d), (G, m * d), (G, m * d_v))
        for name in ("k_weights", "v_weights"):
            share.cut(self, name, (G, m))
        H, G = share.count(H), share.count(G)
        self.heads, self.parts = (H, G, G), [H * d, G * m * d, G * m * d_v]
        self.sizes = [n * w for n, w in zip(self.heads, self.widths, strict=True)]

    def merge(self) -> dict[str, Tensor]:
        """The state of the `QKV` that computes the same."""
        weight, bias = self.merged()
        state = {"qkv_proj.weight": weight} | ({} if bias is None else {"qkv_proj.bias": bias})
        return {name: value.detach() for name, value in state.items()}

    def weight_flops(self) -> int:
        """Of the two sums, per forward."""
        return 2 * self.dim * sum(self.parts[1:])


def merge(mixer: Mixer) -> dict[str, Tensor]:
    """The state dict of the gqa (with the options that both have) that computes what ``mixer`` does."""
    rest = {name: t for name, t in mixer.state_dict().items() if not name.startswith("project.")}
    return {f"project.{name}": t for name, t in mixer.project.merge().items()} | rest


@register(
    Card(
        name="wgqa",
        title="Weighted grouped-query attention",
        paper="Weighted Grouped Query Attention in Transformers",
        arxiv="2407.10855",
        family="sharing",
        summary="Each group's key and value head is a learned weighted sum of the weights of H heads.",
        cached="k, v: 2 G d per token",
        claims=(
            Claim(
                "gqa -> wgqa: CNN/DM R1 41.7 -> 41.9, WMT14 BLEU 26.1 -> 26.3",
                where="T5-base fine-tuned from MHA",
            ),
            Claim("a random start is clearly worse", where="T5-base fine-tuned from MHA"),
        ),
        small={"num_kv_heads": 2, "weight_kind": "row"},
    ),
    frames=("score", "recurrent"),
)
def wgqa(
    draft: Draft,
    *,
    weight_kind: Literal["scalar", "row", "col"] = "scalar",
    weight_init: Literal["mean", "random"] = "mean",
) -> None:
    """Sets the projection; ``num_kv_heads`` G defaults as in gqa, 1 is the paper's weighted mqa.

    Args:
        weight_kind: what a weight scales: a head's block, its rows (inputs) or its columns (channels).
        weight_init: every weight G / H, or N(0, 1).

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: gqa with mean-pooled key and value weights at the start; gqa with `merge`'s weights; mha with
        G = H and weights 1.
    """
    draft.check_unbuilt()
    if draft.host["num_kv_heads"] is None:
        H = draft.num_heads
        set_heads(draft, largest_divisor(H, H // 4), draft.host["head_dim"])

    def complete(done: Draft) -> None:
        H, G = done.num_heads, done.num_kv_heads
        if H % G:
            raise ValueError(f"num_kv_heads: groups of heads are summed, so it must divide {H}, got {G}")
        if done.shapes()["v"][0] != G:
            raise ValueError(
                f"num_v_heads: keys and values are summed over the same {G} groups, "
                f"got {done.shapes()['v'][0]} value heads; leave wgqa out"
            )
        done.put("project", WeightedKV(done, weight_kind, weight_init, "read" in done.frame.slots))

    draft.last(complete)
