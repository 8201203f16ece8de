"""What happens to per-head outputs before the output projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Call, Site, Stage, flag
from attnzoo.cost import Work
from attnzoo.ops.fused import rms_norm


class HeadNorm(Stage):
    """RMSNorm over each head's output with one gain ``(d_v,)`` shared by the heads."""

    rank = 30

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.gain = flag(nn.Parameter(torch.ones(width)), decay=False)
        self.eps = eps

    def forward(self, o: Tensor, call: Call) -> Tensor:
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
        gate = self.act(self.gate(call.x).unflatten(-1, self.shape))
        return o * (gate if self.rescale == 1.0 else gate * self.rescale)

    def work(self, length: int) -> Iterable[Work]:
        yield Work(
            "gates", "output gate", 2 * length * self.dim * self.shape[0] * self.shape[1], per_head=True
        )
