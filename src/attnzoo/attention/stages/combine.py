"""What happens to per-head outputs before the output projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.site import Site, flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.refine import causal_conv
from attnzoo.cost import Work
from attnzoo.ops.fused import rms_norm
from attnzoo.parallel.tensor import CannotSplit, Share
from attnzoo_kernels.launch import choose
from attnzoo_kernels.norm_gate import MAX_WIDTH, norm_gate


class HeadNorm(Stage):
    """RMSNorm over each head's output with one gain ``(d_v,)`` shared by the heads, or without a gain."""

    rank = 30
    alike = True

    def __init__(self, width: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.gain = flag(nn.Parameter(torch.ones(width)), decay=False) if affine else None
        self.eps = eps

    def forward(self, o: Tensor, call: Call, gate: Tensor | None = None, act: str = "silu") -> Tensor:
        """``gate`` and ``act``: those of the stage that follows, where a kernel does both."""
        gain = o.new_ones(o.shape[-1]) if self.gain is None else self.gain
        if gate is not None or _kernel_runs(o, call):
            return norm_gate(o, gain, gate, activation=act, eps=self.eps, impl=call.impl)
        return rms_norm(o, gain, self.eps)


class FullNorm(Stage):
    """RMSNorm over all heads' outputs together, gains ``(H d_v,)``, or ``groups`` equal parts of them."""

    rank = 30

    def __init__(self, heads: int, width: int, eps: float = 1e-5, groups: int = 1) -> None:
        super().__init__()
        self.gain = flag(nn.Parameter(torch.ones(heads * width)), decay=False)
        self.eps, self.groups, self.heads = eps, groups, heads
        self.share: Share | None = None  # set where a group spans ranks

    def forward(self, o: Tensor, call: Call) -> Tensor:
        flat = o.flatten(2)
        if self.share is not None:
            return self._across(flat).view_as(o)
        if self.groups == 1:
            return rms_norm(flat, self.gain, self.eps).view_as(o)
        parts = flat.unflatten(-1, (self.groups, -1))
        return (rms_norm(parts, parts.new_ones(parts.shape[-1]), self.eps).flatten(2) * self.gain).view_as(o)

    def _across(self, flat: Tensor) -> Tensor:
        """One norm over the heads of all ranks."""
        wide = flat if flat.dtype == torch.float64 else flat.float()
        square = self.share.total(wide.square().sum(-1, keepdim=True)) / (self.share.ranks * flat.shape[-1])
        return (wide * (square + self.eps).rsqrt() * self.gain.to(wide.dtype)).to(flat.dtype)

    def split(self, share: Share) -> None:
        if self.groups > 1 and self.groups % share.ranks:
            raise CannotSplit(
                f"its norms over {self.groups} groups of heads do not divide among {share.ranks} ranks"
            )
        share.cut(self, "gain", (self.heads, len(self.gain) // self.heads))
        self.heads = share.count(self.heads)
        if self.groups == 1:
            self.share = share
        else:
            self.groups //= share.ranks


class LocalConv(Stage):
    """``o + conv(v)``: a causal depthwise convolution of the values beside what mixes them.

    ``conv(v)_t = b + sum_m w_m v_(t - n + 1 + m)`` per channel, cut at document starts; taps and bias start
    as in Conv1d, U(-1/sqrt(n), 1/sqrt(n)), and are not re-initialised.

    Args:
        v: (heads, width) of the values. size: taps n. shared: one set of taps for all heads.
    """

    rank = 20

    def __init__(
        self, v: tuple[int, int], size: int, shared: bool = False, field: str = "lepe_kernel"
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"{field}: must be at least 1, got {size}")
        self.v, self.size, self.shared = v, size, shared
        channels, bound = v[1] if shared else v[0] * v[1], 1 / math.sqrt(size)
        taps, bias = (torch.empty(channels, *more).uniform_(-bound, bound) for more in ((size,), ()))
        self.taps = flag(nn.Parameter(taps), decay=False, reinit=False)
        self.bias = flag(nn.Parameter(bias), decay=False, reinit=False)

    def forward(self, o: Tensor, call: Call) -> Tensor:
        heads = self.v[0]
        taps = self.taps.repeat(heads, 1) if self.shared else self.taps
        bias = self.bias.repeat(heads) if self.shared else self.bias
        y = causal_conv(call.raw.v.transpose(1, 2).flatten(2), taps, call, "conv_local") + bias
        y = y.unflatten(-1, self.v)
        return o + (y if o.shape[2] == heads else y.repeat_interleave(o.shape[2] // heads, dim=2))

    def split(self, share: Share) -> None:
        heads, width = self.v
        if self.shared:
            share.keep(self)
        else:
            share.cut(self, "taps", self.v)
            share.cut(self, "bias", self.v)
        self.v = (share.count(heads), width)

    def memory(self) -> dict[str, Slot]:
        return {"conv_local": Slot("tail", (self.size - 1, self.v[0] * self.v[1]))}

    def elementwise(self) -> dict[str, float]:
        return {"local convolution": 2.0 * self.size * self.v[0] * self.v[1]}


class Gate(Stage):
    """``o * act(x W_g)``: one gate per head, or per channel.

    Args:
        per_channel: a gate for each of the ``num_heads * width`` channels, else one per head.
        act: activation of the gate; rescale: constant factor; bias: of ``W_g``.
    """

    rank = 40
    additive = True

    def __init__(
        self,
        site: Site,
        dim: int,
        num_heads: int,
        width: int,
        act: Callable[[Tensor], Tensor],
        per_channel: bool = True,
        rescale: float = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.shape = (num_heads, width if per_channel else 1)
        self.dim, self.act, self.rescale = dim, act, rescale
        self.gate = site.weights.linear("gate", dim, num_heads * self.shape[1], bias)

    def forward(self, o: Tensor, call: Call) -> Tensor:
        gate = self.act(self.before(call))
        return o * (gate if self.rescale == 1.0 else gate * self.rescale)

    def before(self, call: Call) -> Tensor:
        """The gate before its activation, ``(B, T, H, width or 1)``."""
        return self.gate(call.x).unflatten(-1, self.shape)

    def split(self, share: Share) -> None:
        share.rows(self.gate, self.shape)
        self.shape = (share.count(self.shape[0]), self.shape[1])

    def work(self, length: int) -> Iterable[Work]:
        yield Work(
            "gates", "output gate", 2 * length * self.dim * self.shape[0] * self.shape[1], per_head=True
        )


class LowRankGate(Gate):
    """``o * act(x G_1 G_2 + b)``: a gate per channel through ``bottleneck`` channels."""

    def __init__(
        self,
        site: Site,
        dim: int,
        num_heads: int,
        width: int,
        act: Callable[[Tensor], Tensor],
        bottleneck: int,
        bias: bool = False,
    ) -> None:
        Stage.__init__(self)
        self.shape, self.dim, self.act, self.rescale = (num_heads, width), dim, act, 1.0
        self.bottleneck = bottleneck
        self.down = site.weights.linear("gate_down", dim, bottleneck)
        self.gate = site.weights.linear("gate", bottleneck, num_heads * width, bias)

    def before(self, call: Call) -> Tensor:
        return self.gate(self.down(call.x)).unflatten(-1, self.shape)

    def split(self, share: Share) -> None:
        Gate.split(self, share)
        share.keep(self.down)

    def work(self, length: int) -> Iterable[Work]:
        yield Work("gates", "output gate, down", 2 * length * self.dim * self.bottleneck)
        up = 2 * length * self.bottleneck * self.shape[0] * self.shape[1]
        yield Work("gates", "output gate", up, per_head=True)


# Activations that the kernel knows.
FUSED = {F.silu: "silu", torch.sigmoid: "sigmoid"}


def combined(stages: Iterable[Stage], o: Tensor, call: Call) -> Tensor:
    """The stages in turn; a head norm and the gate of its channels are one kernel on a GPU."""
    waiting = list(stages)
    while waiting:
        stage = waiting.pop(0)
        if isinstance(stage, HeadNorm) and waiting and _fuses(waiting[0], o, call):
            gate = waiting.pop(0)
            o = stage(o, call, gate.before(call).to(o.dtype), FUSED[gate.act])
        else:
            o = stage(o, call)
    return o


def _fuses(stage: Stage, o: Tensor, call: Call) -> bool:
    plain = isinstance(stage, Gate) and stage.rescale == 1.0 and stage.act in FUSED
    return plain and stage.shape[1] == o.shape[-1] and _kernel_runs(o, call)


def _kernel_runs(o: Tensor, call: Call) -> bool:
    return o.shape[-1] <= MAX_WIDTH and choose("norm_gate", call.impl, o) == "triton"
