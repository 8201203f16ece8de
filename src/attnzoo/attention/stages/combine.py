"""What happens to per-head outputs before the output projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Call, Site, Stage, flag
from attnzoo.cost import Work
from attnzoo.ops.fused import rms_norm
from attnzoo_kernels.launch import choose
from attnzoo_kernels.norm_gate import MAX_WIDTH, norm_gate


class HeadNorm(Stage):
    """RMSNorm over each head's output with one gain ``(d_v,)`` shared by the heads."""

    rank = 30

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.gain = flag(nn.Parameter(torch.ones(width)), decay=False)
        self.eps = eps

    def forward(self, o: Tensor, call: Call, gate: Tensor | None = None, act: str = "silu") -> Tensor:
        """``gate`` and ``act``: those of the stage that follows, where a kernel does both."""
        if gate is not None or _kernel_runs(o, call):
            return norm_gate(o, self.gain, gate, activation=act, eps=self.eps, impl=call.impl)
        return rms_norm(o, self.gain, self.eps)


class Gate(Stage):
    """``o * act(x W_g)``: one gate per head, or per channel.

    Args:
        per_channel: a gate for each of the ``num_heads * width`` channels, else one per head.
        act: activation of the gate; rescale: constant factor.
    """

    rank = 40

    def __init__(
        self,
        site: Site,
        dim: int,
        num_heads: int,
        width: int,
        act: Callable[[Tensor], Tensor],
        per_channel: bool = True,
        rescale: float = 1.0,
    ) -> None:
        super().__init__()
        self.shape = (num_heads, width if per_channel else 1)
        self.dim, self.act, self.rescale = dim, act, rescale
        self.gate = site.weights.linear("gate", dim, num_heads * self.shape[1])

    def forward(self, o: Tensor, call: Call) -> Tensor:
        gate = self.act(self.before(call))
        return o * (gate if self.rescale == 1.0 else gate * self.rescale)

    def before(self, call: Call) -> Tensor:
        """The gate before its activation, ``(B, T, H, width or 1)``."""
        return self.gate(call.x).unflatten(-1, self.shape)

    def work(self, length: int) -> Iterable[Work]:
        yield Work(
            "gates", "output gate", 2 * length * self.dim * self.shape[0] * self.shape[1], per_head=True
        )


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
