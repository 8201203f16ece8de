"""Learned biases of scores that depend on the distance only, as in Mega (arXiv 2209.10655)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnzoo.attention.call import Call
from attnzoo.attention.site import flag
from attnzoo.attention.stages.position import Rope


class TableBias(nn.Module):
    """``table[T_max - 1 + j - i]`` for a query at i and a key at j; given positions that are further apart
    than any of the table take its ends.
    """

    appended = 0

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.table = flag(nn.Parameter(0.02 * torch.randn(2 * reach - 1)), reinit=False)

    def forward(self, distance: Tensor) -> Tensor:
        """``distance`` key minus query."""
        last = self.reach - 1
        return self.table[(last + distance.clamp(-last, last)).long()]


class RotaryBias(nn.Module):
    """``a . R(j - i) b`` for a query at i and a key at j: further channels of both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.appended, self.rope = width, Rope(width, field="z_dim")
        self.a = flag(nn.Parameter(0.02 * torch.randn(width)), reinit=False)
        self.b = flag(nn.Parameter(0.02 * torch.randn(width)), reinit=False)

    def forward(self, vector: Tensor, pos: Tensor, call: Call) -> Tensor:
        """``(B or 1, 1, T, Z)``."""
        wide = vector.expand(pos.shape[0], 1, pos.shape[1], -1)
        return self.rope.turn(wide, pos, call)
