"""Maps on queries, keys and values between the projection and the position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.ops import conv
from attnzoo.ops.fused import rms_norm
from attnzoo.parallel.tensor import Share
from attnzoo_kernels.launch import choose
from attnzoo_kernels.short_conv import MAX_TAPS, short_conv


class QKNorm(Stage):
    """RMSNorm over each query and key head, with one gain each (Qwen3 form).

    Args:
        sides: "qk", or "q" where the keys are another layer's.
    """

    rank = 30
    alike = True

    def __init__(self, width: int, eps: float = 1e-6, sides: str = "qk") -> None:
        super().__init__()
        for side in sides:
            self.register_parameter(f"{side}_gain", flag(nn.Parameter(torch.ones(width)), decay=False))
        self.eps, self.sides = eps, sides

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        q = self._normed(q, self.q_gain)
        return q, self._normed(k, self.k_gain) if "k" in self.sides else k, v

    def _normed(self, z: Tensor, gain: Tensor) -> Tensor:
        # in the projection's own order of axes, so that nothing is copied
        return rms_norm(z.transpose(1, 2), gain, self.eps).transpose(1, 2)


class L2Norm(Stage):
    """Queries and keys of unit length: ``x / sqrt(sum x² + eps)`` over the head."""

    rank = 32  # after a norm with gains, so that keys stay of unit length
    alike = True

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        return self._unit(q), self._unit(k), v

    def _unit(self, z: Tensor) -> Tensor:
        wide = z if z.dtype == torch.float64 else z.float()
        return (wide * (wide.square().sum(-1, keepdim=True) + self.eps).rsqrt()).to(z.dtype)


class ShortConv(Stage):
    """Causal depthwise convolutions on q, k and v, each with its activation.

    ``y_t = act(sum_m w_m x_(t - n + 1 + m))`` per channel, cut at document starts; the last tap meets the
    token itself. Taps start as in Conv1d, U(-1/sqrt(n), 1/sqrt(n)), and are not re-initialised.

    Args:
        shapes: (heads, width) of q, k, v. size: taps n. acts: activation of q, k, v, or None.
        bias: one per channel, added before the activation; it starts as the taps do.
    """

    rank = 10
    names = ("conv_q", "conv_k", "conv_v")

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        size: int,
        acts: Sequence[Callable[[Tensor], Tensor] | None],
        bias: bool = False,
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"conv_kernel: must be at least 1, got {size}")
        self.shapes, self.size, self.acts = shapes, size, acts
        for name, (heads, width) in zip(self.names, shapes, strict=True):
            taps = nn.Parameter(torch.empty(heads * width, size).uniform_(-1, 1) / math.sqrt(size))
            self.register_parameter(name, flag(taps, decay=False, reinit=False))
            more = None
            if bias:
                start = torch.empty(heads * width).uniform_(-1, 1) / math.sqrt(size)
                more = flag(nn.Parameter(start), decay=False, reinit=False)
            self.register_parameter(f"{name}_bias", more)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self._one(i, z, call) for i, z in enumerate((q, k, v)))

    def _one(self, i: int, z: Tensor, call: Call) -> Tensor:
        flat = z.transpose(1, 2).flatten(2)
        name = self.names[i]
        bias = getattr(self, f"{name}_bias")
        y = causal_conv(flat, getattr(self, name), call, name, self.acts[i], bias)
        return y.unflatten(-1, self.shapes[i]).transpose(1, 2)

    def split(self, share: Share) -> None:
        for name, shape in zip(self.names, self.shapes, strict=True):
            share.cut(self, name, shape)
            if getattr(self, f"{name}_bias") is not None:
                share.cut(self, f"{name}_bias", shape)
        self.shapes = [(share.count(heads), width) for heads, width in self.shapes]

    def memory(self) -> dict[str, Slot]:
        sizes = (h * d for h, d in self.shapes)
        return {name: Slot("tail", (self.size - 1, c)) for name, c in zip(self.names, sizes, strict=True)}

    def elementwise(self) -> dict[str, float]:
        return {"short convolutions": 2.0 * self.size * sum(h * d for h, d in self.shapes)}


class Activation(Stage):
    """The activations of a `ShortConv` that is left out."""

    rank = 10
    alike = True

    def __init__(self, acts: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.acts = acts

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(act(z) for act, z in zip(self.acts, (q, k, v), strict=True))


def causal_conv(
    z: Tensor,
    taps: Tensor,
    call: Call,
    slot: str,
    act: Callable[[Tensor], Tensor] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution of ``z`` ``(B, T, C)`` with ``taps`` ``(C, n)`` over the token's own document,
    plus ``bias`` ``(C,)``, then ``act``."""
    n, T = taps.shape[1], z.shape[1]
    order = None if call.line.doc is None else call.line.order
    kernel = n <= MAX_TAPS and choose("short_conv", call.impl, z, taps) == "triton"
    if not kernel and z.is_cpu and call.mem.alone and act in (None, F.silu):
        return conv.causal_conv(z, taps, bias, order, act is F.silu)
    # a kernel needs no zeros before the first token
    both = z if kernel and call.mem.alone else call.mem.tail(slot, z, n - 1)
    if kernel:
        fused = "silu" if act is F.silu else None
        tail, now = both.split([both.shape[1] - T, T], dim=1)
        tail = tail if tail.shape[1] else None
        y = short_conv(now, taps, bias, activation=fused, tail=tail, order=order, impl="triton")
        return y if act is None or fused else act(y)
    y = both[:, n - 1 :] * taps[:, n - 1]
    for back in range(1, n):
        before = both[:, n - 1 - back : n - 1 - back + T]
        if order is not None:
            before = torch.where((order >= back)[..., None], before, torch.zeros((), dtype=z.dtype))
        y = torch.addcmul(y, before, taps[:, n - 1 - back].to(before.dtype))
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y if act is None else act(y)
