"""What a recurrent state forgets and how strongly it is written: the gates slot.

Each makes `Terms` from q, k, v ``(B, T, H, d)``, one head per state. Log decays are formed in at least fp32,
as logs: a decay near 1 has no digits left in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.recurrent import Terms
from attnzoo.attention.site import flag
from attnzoo.cost import Work
from attnzoo.parallel.tensor import Share


def wide(z: Tensor) -> Tensor:
    """``z`` in fp32, or in fp64 if it is."""
    return z if z.dtype == torch.float64 else z.float()


def step_bias(count: int) -> nn.Parameter:
    """Biases under which softplus starts at steps between 1e-3 and 1e-1, evenly in the logarithm."""
    step = torch.empty(count).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
    return flag(nn.Parameter(step + torch.log(-torch.expm1(-step))), decay=False, reinit=False)


def log_rate(count: int, low: float = 1.0, high: float = 16.0) -> nn.Parameter:
    """``log U(low, high)``: decay rates, kept as logs so that they stay positive."""
    rate = torch.empty(count).uniform_(low, high)
    return flag(nn.Parameter(rate.log()), decay=False, reinit=False)


class StepDecayBeta(Stage):
    """Log decay ``-exp(A_log) softplus(x W_a + dt_bias)`` and write strength per value head, from x.

    Args:
        neg_eigval: beta in (0, 2), so that a write may flip what a key held.
    """

    kind = "delta"

    def __init__(self, draft: Draft, neg_eigval: bool) -> None:
        super().__init__()
        self.sizes, self.top = (draft.dim, draft.o_heads), 2.0 if neg_eigval else 1.0
        self.decay = draft.linear("decay", *self.sizes)
        self.beta = draft.linear("beta", *self.sizes)
        self.A_log = log_rate(draft.o_heads, 1e-3)
        self.dt_bias = step_bias(draft.o_heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Terms:
        a, b = wide(self.decay(call.x)), wide(self.beta(call.x))
        g = -self.A_log.to(a.dtype).exp() * F.softplus(a + self.dt_bias.to(a.dtype))
        return Terms(q, k, v, g=g, beta=self.top * torch.sigmoid(b))

    def split(self, share: Share) -> None:
        dim, heads = self.sizes
        for layer in (self.decay, self.beta):
            share.rows(layer, (heads, 1))
        for name in ("A_log", "dt_bias"):
            share.cut(self, name, (heads, 1))
        self.sizes = (dim, share.count(heads))

    def work(self, length: int) -> Iterable[Work]:
        yield Work("gates", "decay and beta", 4 * length * self.sizes[0] * self.sizes[1])


class Beta(Stage):
    """Write strength ``sigmoid(x W_beta)`` per head; nothing decays.

    Args:
        learned: from x, else 1. neg_eigval: twice that.
    """

    kind = "delta"

    def __init__(self, draft: Draft, learned: bool, neg_eigval: bool) -> None:
        super().__init__()
        self.sizes, self.top = (draft.dim, draft.o_heads), 2.0 if neg_eigval else 1.0
        self.beta = draft.linear("beta", *self.sizes) if learned else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Terms:
        if self.beta is None:
            return Terms(q, k, v, beta=self.top * torch.ones_like(wide(k[..., 0])))
        return Terms(q, k, v, beta=self.top * torch.sigmoid(wide(self.beta(call.x))))

    def split(self, share: Share) -> None:
        dim, heads = self.sizes
        if self.beta is not None:
            share.rows(self.beta, (heads, 1))
        self.sizes = (dim, share.count(heads))

    def work(self, length: int) -> Iterable[Work]:
        if self.beta is not None:
            yield Work("gates", "beta", 2 * length * self.sizes[0] * self.sizes[1])


class FixedDecay(Stage):
    """A constant log decay per head: ``logs(h)`` of the head indices, made anew in the working precision."""

    kind = "scalar"

    def __init__(self, heads: int, logs: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.heads, self.logs = 0, heads, logs

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Terms:
        last = self.first + self.heads
        index = torch.arange(self.first, last, device=q.device, dtype=wide(q[:0]).dtype)
        return Terms(q, k, v, g=self.logs(index))

    def split(self, share: Share) -> None:
        self.first, self.heads = share.part(self.heads)


class StepDecay(Stage):
    """A step size per head decides what is forgotten and how much is written: ``g = -exp(A_log) step``,
    ``v <- step v``, from ``call.notes["dt"]`` ``(B, T, H)``.

    Args:
        limit: smallest and largest step.
    """

    kind = "scalar"

    def __init__(self, heads: int, limit: tuple[float, float]) -> None:
        super().__init__()
        self.limit = limit
        self.A_log, self.dt_bias = log_rate(heads), step_bias(heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Terms:
        dt = wide(call.notes["dt"])
        step = F.softplus(dt + self.dt_bias.to(dt.dtype)).clamp(*self.limit)
        g = -self.A_log.to(dt.dtype).exp() * step
        return Terms(q, k, (v * step[..., None]).to(v.dtype), g=g)

    def split(self, share: Share) -> None:
        for name in ("A_log", "dt_bias"):
            share.cut(self, name, (len(getattr(self, name)), 1))


class LowRankDecay(Stage):
    """A log decay per key channel: ``logsigmoid(x W_1 W_2 + b) / divisor``.

    Args:
        bottleneck: columns of W_1. divisor: keeps decays near 1 at the start. least: lower clamp, or None.
    """

    kind = "diagonal"

    def __init__(self, draft: Draft, bottleneck: int, divisor: float, least: float | None) -> None:
        super().__init__()
        self.dim, self.bottleneck = draft.dim, bottleneck
        self.shape, self.repeat = (draft.num_kv_heads, draft.head_dim), draft.o_heads // draft.num_kv_heads
        self.divisor, self.least = divisor, least
        self.down = draft.linear("decay_down", draft.dim, bottleneck)
        self.up = draft.linear("decay_up", bottleneck, math.prod(self.shape), bias=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Terms:
        g = F.logsigmoid(wide(self.up(self.down(call.x)))) / self.divisor
        g = g if self.least is None else g.clamp(min=self.least)
        g = g.unflatten(-1, self.shape)
        return Terms(q, k, v, g=g if self.repeat == 1 else g.repeat_interleave(self.repeat, dim=2))

    def split(self, share: Share) -> None:
        heads, width = self.shape
        share.keep(self.down)
        share.rows(self.up, self.shape)
        self.shape = (share.count(heads), width)
        self.repeat = share.count(heads * self.repeat) // self.shape[0]

    def work(self, length: int) -> Iterable[Work]:
        width = self.dim + math.prod(self.shape)
        yield Work("gates", "decay", 2 * length * self.bottleneck * width)


class ChannelDecayBeta(Stage):
    """A log decay per key channel of each value head, through a bottleneck, and a write strength per head.

        g = -exp(A_log_h) softplus(x F_1 F_2 + dt_bias)
        g = bound sigmoid(exp(A_log_h) (x F_1 F_2 + dt_bias))

    Args:
        bottleneck: columns of F_1. bound: least log decay of the second form; None = the first.
        neg_eigval: beta in (0, 2).
    """

    kind = "delta_diagonal"

    def __init__(self, draft: Draft, bottleneck: int, bound: float | None, neg_eigval: bool) -> None:
        super().__init__()
        self.dim, self.bottleneck, self.bound = draft.dim, bottleneck, bound
        self.shape, self.top = (draft.o_heads, draft.head_dim), 2.0 if neg_eigval else 1.0
        self.down = draft.linear("decay_down", draft.dim, bottleneck)
        self.up = draft.linear("decay_up", bottleneck, math.prod(self.shape))
        self.beta = draft.linear("beta", draft.dim, draft.o_heads)
        plain = flag(nn.Parameter(torch.zeros(draft.o_heads)), decay=False, reinit=False)
        self.A_log = log_rate(draft.o_heads) if bound is None else plain
        self.dt_bias = step_bias(math.prod(self.shape))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Terms:
        raw = wide(self.up(self.down(call.x)))
        raw = (raw + self.dt_bias.to(raw.dtype)).unflatten(-1, self.shape)
        rate = self.A_log.to(raw.dtype).exp()[:, None]
        g = -rate * F.softplus(raw) if self.bound is None else self.bound * torch.sigmoid(rate * raw)
        return Terms(q, k, v, g=g, beta=self.top * torch.sigmoid(wide(self.beta(call.x))))

    def split(self, share: Share) -> None:
        heads, width = self.shape
        share.keep(self.down)
        share.rows(self.up, self.shape)
        share.rows(self.beta, (heads, 1))
        share.cut(self, "A_log", (heads, 1))
        share.cut(self, "dt_bias", self.shape)
        self.shape = (share.count(heads), width)

    def work(self, length: int) -> Iterable[Work]:
        width = self.dim + math.prod(self.shape)
        yield Work("gates", "decay", 2 * length * self.bottleneck * width)
        yield Work("gates", "beta", 2 * length * self.dim * self.shape[0])
