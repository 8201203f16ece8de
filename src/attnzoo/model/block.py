"""One layer of the decoder: a mixer and a SwiGLU MLP, each on the normed stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Mixer
from attnzoo.attention.site import INIT_STD, flag
from attnzoo.attention.slots import Cache
from attnzoo.attention.timeline import Timeline
from attnzoo.context import Context
from attnzoo.ops.fused import linear, rms_norm, split_linear, swiglu
from attnzoo.parallel.tensor import CannotSplit, Share


class RMSNorm(nn.Module):
    """RMSNorm over the last axis with a gain (arXiv 1910.07467), in at least fp32, in the input's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = flag(nn.Parameter(torch.ones(dim)), decay=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """``(silu(x W_gate) * x W_up) W_down`` (arXiv 2002.05202), gate and up in one matrix."""

    def __init__(self, dim: int, hidden: int, out_std: float) -> None:
        super().__init__()
        self.halves = [hidden, hidden]
        self.share: Share | None = None  # the rank's share of the channels, where ranks share them
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        nn.init.normal_(self.up.weight, std=INIT_STD)
        nn.init.normal_(self.down.weight, std=out_std)

    def forward(self, x: Tensor) -> Tensor:
        if self.share is None:
            return linear(self.down, swiglu(*split_linear(self.up, x, self.halves)))
        hidden = swiglu(*split_linear(self.up, self.share.enter(x), self.halves))
        return self.share.leave(linear(self.down, hidden))

    def split(self, share: Share) -> None:
        """Keeps one rank's channels.

        Raises:
            CannotSplit: they do not divide among the ranks.
        """
        hidden = self.halves[0]
        if hidden % share.ranks:
            raise CannotSplit(f"its {hidden} channels do not divide among {share.ranks} ranks")
        share.rows(self.up, (hidden, 1), (hidden, 1))
        share.columns(self.down, hidden, 1)
        self.halves, self.share = [hidden // share.ranks] * 2, share


class Block(nn.Module):
    """``h + mixer(norm(h))``, then ``h + mlp(norm(h))``; where the mixer asks for a single residual,
    ``h + mlp(norm(mixer(norm(h))))``.
    """

    def __init__(self, mixer: Mixer, dim: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = RMSNorm(dim, eps), mixer
        self.mlp_norm, self.mlp = RMSNorm(dim, eps), SwiGLU(dim, hidden, mixer.site.out_std)

    def forward(self, h: Tensor, ctx: Context, line: Timeline, cache: Cache | None = None) -> Tensor:
        y = self.mixer(self.mixer_norm(h), ctx.at(h, line), cache)
        if self.mixer.single_residual:
            return h + self.mlp(self.mlp_norm(y))
        h = h + y
        return h + self.mlp(self.mlp_norm(h))


def default_hidden(dim: int) -> int:
    """Hidden width of the MLP: 8/3 of ``dim``, up to a multiple of 32, so that it has 8 dim² parameters."""
    return -(-8 * dim // 3 // 32) * 32 if dim >= 32 else 3 * dim
