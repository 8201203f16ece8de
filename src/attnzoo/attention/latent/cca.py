"""Compressed convolutional attention: all of attention in a narrower space, repaired by convolutions on q, k.

Compressed Convolutional Attention: Efficient Attention in a Compressed Latent Space, arXiv 2510.04476.

    q0 = x W_q (H heads),  k0 = x W_k (G heads),  H d < D
    u = [q0 ; k0],  u1 = conv1(u) per channel,  u2 = conv2(u1) inside each head; causal, with biases
    q^_h = u2_q,h + (q0_h + k0_g(h)) / 2,      k^_g = u2_k,g + (mean_(h in g) q0_h + k0_g) / 2
    q = sqrt(d) q^ / |q^|,                     k = sqrt(d) beta_g k^ / |k^|,  beta = exp(min(tau, 2)) or tau
    v_t = [x_t W_va ; x_(t-1) W_vb],  RoPE on q and k,  y = concat_h(attend(q_h, k_g, v_g; 1/sqrt(d))) W_o

Zeros are padded once, before conv1: at the places before a document conv2 sees conv1's bias, not zeros.
Cached: k (after RoPE) and v, 2 G d per token; k1 - 1 inputs of conv1, k2 - 1 of conv2, and x W_vb of the
last token (as much as k1 + k2 - 2 inputs of conv1, from which the released code starts again).
Our choice: H d is half of D by default; ``conv`` off leaves u2 = u where ``qk_mean`` stays on; with biases
the token before the first counts as x = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.project import QKV, largest_divisor
from attnzoo.attention.stages.refine import L2Norm, causal_conv
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.parallel.tensor import CannotSplit, Share
from attnzoo.registry import Card, register

MOST_TAU = 2.0  # the exponential of a temperature beyond it lets training diverge


class ShiftedValue(QKV):
    """`QKV` whose second half of the value channels, over all heads, is the previous token's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.now = self.sizes[2] // 2  # channels of the token's own

    def split(self, share: Share) -> None:
        own = share.part(self.heads[2])
        super().split(share)
        self.now = min(max(self.now - own.first * self.widths[2], 0), self.sizes[2])

    def qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().qkv(x, call)
        v = v.transpose(1, 2).flatten(2)
        now, late = v.split([self.now, v.shape[-1] - self.now], dim=-1)
        before = call.mem.tail("value", late, 1)[:, :-1]
        start = torch.zeros((), dtype=late.dtype, device=late.device)
        if getattr(self.qkv_proj, "bias", None) is not None:
            bias = self.qkv_proj.bias
            start = bias[len(bias) - late.shape[-1] :].to(late.dtype)
        before = torch.where((call.line.order > 0)[..., None], before, start)
        v = torch.cat([now, before], dim=-1)
        return q, k, v.unflatten(-1, (self.heads[2], self.widths[2])).transpose(1, 2)

    def memory(self) -> dict[str, Slot]:
        return super().memory() | {"value": Slot("tail", (1, self.sizes[2] - self.now))}


class QKConv(Stage):
    """Two causal convolutions over queries and keys together, and the mean of a query and its key.

    Args:
        heads: H query and G key heads, each ``width`` wide. kernels: taps of the convolution per channel and
            of the one inside heads; None = neither. mean: adds the mean.
    """

    rank = 10

    def __init__(self, heads: tuple[int, int], width: int, kernels: tuple[int, int] | None, mean: bool):
        super().__init__()
        self.heads, self.width, self.kernels, self.mean = heads, width, kernels, mean
        channels = sum(heads) * width
        if kernels:
            bounds = (1 / math.sqrt(kernels[0]), 1 / math.sqrt(width * kernels[1]))
            shapes = ((channels, kernels[0]), (channels, width, kernels[1]))
            for i, (bound, shape) in enumerate(zip(bounds, shapes, strict=True), start=1):
                weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
                bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))
                self.register_parameter(f"conv{i}", flag(weight, decay=False, reinit=False))
                self.register_parameter(f"bias{i}", flag(bias, decay=False, reinit=False))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        (H, G), both = self.heads, torch.cat([q, k], dim=1)  # (B, H + G, T, d)
        if self.kernels:
            both = self._convolved(both.transpose(1, 2), call).transpose(1, 2)
        new_q, new_k = both.split([H, G], dim=1)
        if not self.mean:
            return new_q, new_k, v
        groups = q.unflatten(1, (G, H // G))
        new_q = new_q + (groups + k[:, :, None]).flatten(1, 2) / 2
        return new_q, new_k + (groups.mean(2) + k) / 2, v

    def _convolved(self, u: Tensor, call: Call) -> Tensor:
        """``(B, T, H + G, d)``."""
        (_, taps), T, heads = self.kernels, u.shape[1], sum(self.heads)
        first = causal_conv(u.flatten(2), self.conv1, call, "conv1")
        first = first + self.bias1.to(first.dtype)
        tail = call.mem.tail("conv2", first, taps - 1)
        order, seen = call.line.order, []
        for back in reversed(range(1, taps)):
            before = tail[:, taps - 1 - back : taps - 1 - back + T]
            # before its document stand the zeros that were padded to u: conv1 makes its bias of them
            seen.append(torch.where((order >= back)[..., None], before, self.bias1.to(before.dtype)))
        window = torch.stack([*seen, first], dim=2).unflatten(-1, (heads, self.width))
        weight = self.conv2.unflatten(0, (heads, self.width))
        second = torch.einsum("btmhi,hoim->btho", window, weight.to(window.dtype))
        return second + self.bias2.to(second.dtype).unflatten(0, (heads, self.width))

    def split(self, share: Share) -> None:
        (H, G), d = self.heads, self.width
        if self.mean and share.count(G) * share.ranks != G:
            raise CannotSplit("a key takes the mean of its queries, which are on several ranks")
        for i in (1, 2) if self.kernels else ():
            share.cut(self, f"conv{i}", (H, d), (G, d))
            share.cut(self, f"bias{i}", (H, d), (G, d))
        self.heads = (share.count(H), share.count(G))

    def memory(self) -> dict[str, Slot]:
        channels = sum(self.heads) * self.width
        names = ("conv1", "conv2") if self.kernels else ()
        return {n: Slot("tail", (k - 1, channels)) for n, k in zip(names, self.kernels or (), strict=True)}

    def work(self, length: int) -> Iterable[Work]:
        if self.kernels:
            flops = 2 * length * sum(self.heads) * self.width**2 * self.kernels[1]
            yield Work("projections", "convolution inside heads", flops)

    def elementwise(self) -> dict[str, float]:
        if not self.kernels:
            return {}
        return {"convolution per channel": 2.0 * self.kernels[0] * sum(self.heads) * self.width}


class SphereNorm(L2Norm):
    """Queries of length sqrt(d), keys of length sqrt(d) times a temperature of their head."""

    def __init__(self, kv_heads: int, temp: str) -> None:
        super().__init__(eps=1e-12)
        self.temp = temp
        start = torch.zeros(kv_heads) if temp == "exp" else torch.ones(kv_heads)
        self.tau = flag(nn.Parameter(start), decay=False, reinit=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        beta = self.tau.clamp(max=MOST_TAU).exp() if self.temp == "exp" else self.tau
        length = q.shape[-1] ** 0.5
        return self._unit(q) * length, self._unit(k) * (length * beta).to(k.dtype)[:, None, None], v

    def split(self, share: Share) -> None:
        share.cut(self, "tau", (len(self.tau), 1))


def compress(
    draft: Draft,
    conv_kernels: tuple[int, ...],
    conv: bool,
    qk_mean: bool,
    value_shift: bool,
    unit_norm: bool,
    temp: str,
) -> None:
    """Sets projection and refinement of `cca` and `ccgqa`."""
    if len(conv_kernels) != 2 or min(conv_kernels) < 1:
        raise ValueError(
            f"conv_kernels: must be two taps of at least 1, got {list(conv_kernels)}; set conv=false for none"
        )
    if draft.host["head_dim"] is None:
        width = max(2, draft.dim // (4 * draft.num_heads) * 2)
        if draft.v_head_dim == draft.head_dim:  # a layer around it may want values of a width of its own
            draft.v_head_dim = width
        draft.head_dim = width

    def complete(done: Draft) -> None:
        (H, d), (G, _), (v_heads, d_v) = done.shapes().values()
        if value_shift:
            if v_heads * d_v % 2:
                raise ValueError(
                    f"head_dim: half of the {v_heads} x {d_v} value channels are shifted, got an odd number; "
                    "make it even or set value_shift=false"
                )
            done.put(
                "project",
                ShiftedValue(done.site, done.dim, H, G, d, d_v, done.host["qkv_bias"], num_v_heads=v_heads),
            )
        if conv or qk_mean:
            done.put("refine", QKConv((H, G), d, conv_kernels if conv else None, qk_mean))
        if unit_norm:
            done.put("refine", SphereNorm(G, temp))

    draft.last(complete)


@register(
    Card(
        name="cca",
        title="Compressed convolutional attention",
        paper="Compressed Convolutional Attention: Efficient Attention in a Compressed Latent Space",
        arxiv="2510.04476",
        family="latent",
        summary="Attention runs in a narrower space, with short convolutions on queries and keys.",
        cached="k, v: 2 H d per token, and the last inputs of two convolutions",
        claims=(
            Claim("loss 2.307 against 2.297 of mha", "val_bpb", "higher", "mha", "1B dense, 300B tokens"),
            Claim("loss 2.307 against 2.321 of mla", "val_bpb", "lower", "mla", "1B dense, 300B tokens"),
        ),
    ),
)
def cca(
    draft: Draft,
    *,
    conv_kernels: tuple[int, ...] = (2, 2),
    conv: bool = True,
    qk_mean: bool = True,
    value_shift: bool = True,
    unit_norm: bool = True,
    temp: Literal["exp", "linear"] = "exp",
) -> None:
    """Sets projection and refinement.

    Args:
        conv_kernels: taps of the convolution per channel and of the one inside heads, each at least 1.
        conv, qk_mean, value_shift: the convolutions, the query-key mean, values of the previous token.
        unit_norm: queries and keys of fixed length, and the temperature of keys.
        temp: beta = exp(tau), or tau itself. head_dim (of the frame): default D / (2 H), even.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: gqa with H d < D with all four toggles off.
    """
    compress(draft, conv_kernels, conv, qk_mean, value_shift, unit_norm, temp)


@register(
    Card(
        name="ccgqa",
        title="Compressed convolutional grouped-query attention",
        paper="Compressed Convolutional Attention: Efficient Attention in a Compressed Latent Space",
        arxiv="2510.04476",
        family="latent",
        summary="Compressed convolutional attention with fewer key/value heads than query heads.",
        cached="k, v: 2 G d per token, and the last inputs of two convolutions",
        claims=(
            Claim("loss 2.286 against 2.297 of mha", "val_bpb", "lower", "mha", "1B dense, 300B tokens"),
            Claim("loss 2.286 against 2.297 of gqa", "val_bpb", "lower", "gqa", "1B dense, 300B tokens"),
        ),
        small={"num_kv_heads": 2, "conv_kernels": (3, 2)},
    ),
)
def ccgqa(
    draft: Draft,
    *,
    conv_kernels: tuple[int, ...] = (2, 2),
    conv: bool = True,
    qk_mean: bool = True,
    value_shift: bool = True,
    unit_norm: bool = True,
    temp: Literal["exp", "linear"] = "exp",
) -> None:
    """Sets groups, projection and refinement; options as of `cca`.

    Args:
        num_kv_heads (of the frame): G; default the largest divisor of H that is at most max(1, H / 4).

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: cca with num_kv_heads = num_heads; gqa with H d < D with all toggles off.
    """
    if draft.host["num_kv_heads"] is None:
        draft.num_kv_heads = largest_divisor(draft.num_heads, draft.num_heads // 4)
    compress(draft, conv_kernels, conv, qk_mean, value_shift, unit_norm, temp)
