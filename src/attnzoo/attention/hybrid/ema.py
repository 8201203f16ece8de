"""The damped multi-dimensional moving average of Mega (arXiv 2209.10655), as a convolution or a recurrence.

p = sigmoid(delta), q = 1 - p sigmoid(alpha)                       (D, N) each
h_t = q h_(t-1) + p beta x_t,   y_t = sum_n gamma_n h_(t,n) / sqrt(N) + omega x_t
y = x * K + omega x,   K_m = sum_n gamma_n p_n beta_n q_n^m / sqrt(N)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from attnzoo.attention.call import Call
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.long_conv import (
    carried_conv,
    long_conv,
    long_conv_elementwise,
    long_conv_flops,
)
from attnzoo.cost import Work


class DampedAverage(nn.Module):
    """See the module. Its memory, the state ``h`` ``(D, N)``, or, of a truncated average, the inputs it still
    reaches, is the calling stage's.

    Args:
        dim: channels D. states: N per channel. truncation: lags of the kernel; None = all.
    """

    def __init__(self, dim: int, states: int, truncation: int | None = None) -> None:
        super().__init__()
        self.dim, self.states, self.truncation = dim, states, truncation
        sign = torch.ones(states)
        sign[1::2] = -1
        start = {
            "delta": 0.2 * torch.randn(dim, states),
            "alpha": 0.2 * torch.randn(dim, states),
            "beta": sign + 0.02 * torch.randn(dim, states),
            "gamma": torch.randn(dim, states),
            "omega": torch.randn(dim),
        }
        for name, value in start.items():
            self.register_parameter(name, flag(nn.Parameter(value), decay=False, reinit=False))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """x ``(B, T, D)`` -> the same shape."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            z, T = x.to(wide), x.shape[1]
            held = None if self.truncation is not None else call.mem.state("h")
            delta, alpha, beta, gamma = (p.to(wide) for p in (self.delta, self.alpha, self.beta, self.gamma))
            rate = delta.sigmoid()
            keep, write, read = 1 - rate * alpha.sigmoid(), rate * beta, gamma * self.states**-0.5
            if self.truncation is not None:
                lags = min(self.truncation, T) if call.mem.alone else self.truncation
                y = carried_conv(z, _taps(read * write, _powers(keep, lags)), call, "ema")
            elif T == 1 and held is not None:
                y = self._step(z, keep, write, read, call)
            else:
                powers = _powers(keep, T)
                y = long_conv(z, _taps(read * write, powers), call.line.doc)
                if held is not None:
                    y = y + self._onward(z, keep, write, read, powers, call)
            return (y + self.omega.to(wide) * z).to(x.dtype)

    def _step(self, z: Tensor, keep: Tensor, write: Tensor, read: Tensor, call: Call) -> Tensor:
        h, line = call.mem.state("h").to(z.dtype), call.line
        if line.doc is not None:
            h = h * (line.doc == 0)[..., None]
        new = keep * h + write * z[:, 0, :, None]
        if line.valid is not None:
            new = torch.where(line.valid[..., None], new, h)
        call.mem.put("h", new)
        return (read * new).sum(-1)[:, None]

    def _onward(
        self, z: Tensor, keep: Tensor, write: Tensor, read: Tensor, powers: Tensor, call: Call
    ) -> Tensor:
        """What the cached state adds to the outputs; keeps the state after the last token."""
        line, h, T = call.line, call.mem.state("h").to(z.dtype), z.shape[1]
        more = ((keep * read * h)[..., None] * powers).sum(2).transpose(1, 2)  # (B, T, D)
        if line.doc is None:
            new = torch.einsum("btd,dnt->bdn", z, powers.flip(-1)) * write
            call.mem.put("h", new + powers[..., -1] * keep * h)
            return more
        on = line.doc == 0
        count = line.count()[:, None]
        back = count - 1 - torch.arange(T, device=z.device)  # (B, T) token that many steps before the last
        place, last = back.clamp(min=0), line.doc.gather(1, (count - 1).clamp(min=0))
        mine = (back >= 0) & (line.doc.gather(1, place) == last)
        run = z.gather(1, place[..., None].expand_as(z)) * mine[..., None]
        new = torch.einsum("bmd,dnm->bdn", run, powers) * write
        stays = (last == 0)[..., None]  # so is that of a row without tokens
        new = new + torch.where(stays, keep ** count[..., None] * h, 0.0)
        call.mem.put("h", new)
        return more * on[..., None]

    def memory(self) -> dict[str, Slot]:
        if self.truncation is None:
            return {"h": Slot("state", (self.dim, self.states))}
        return {"ema": Slot("tail", (self.truncation - 1, self.dim))} if self.truncation > 1 else {}

    def work(self, length: int) -> Iterable[Work]:
        """Matmul-like work without a cache."""
        needed, executed = long_conv_flops(length, self.dim)
        yield Work("mixing", "moving average inside blocks", needed, executed, "later tokens of a block")

    def elementwise(self) -> dict[str, float]:
        """Its Fourier transforms at the length of 2048, and the direct terms."""
        return {"moving average": self.dim * (2 + long_conv_elementwise(2048, self.truncation or 2048))}


def _taps(weights: Tensor, powers: Tensor) -> Tensor:
    """``(n, D)`` the kernel K from gamma p beta / sqrt(N) and the powers of q."""
    return (weights[..., None] * powers).sum(1).T


def _powers(base: Tensor, count: int) -> Tensor:
    """``(D, N, count)`` powers from the 0th on: two short tables and their products."""
    step = torch.arange(32, device=base.device)
    far = torch.arange(-(-count // 32), device=base.device) * 32
    both = (base[..., None] ** far)[..., None] * (base[..., None] ** step)[..., None, :]
    return both.flatten(-2)[..., :count]
