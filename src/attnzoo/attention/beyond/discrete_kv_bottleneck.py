"""Discrete key-value bottleneck: features snap to the nearest of K frozen keys, whose values are learned.

Discrete Key-Value Bottleneck, arXiv 2207.11240.

    u_c = x R_c,  i_c = argmin_i |u_c - kappa_c,i|²        C codebooks, R_c fixed and random
    out = mean_c V_c,i_c  (or their concatenation)
    y   = mixer(x) + s out                                 s = 0 at the start
    warm-up: n, m = counts and sums of the u_c by code,  N <- a N + (1 - a) n,  M <- a M + (1 - a) m,
             kappa = M / N;  frozen afterwards

Gradients reach V and s only, so a change of V_c,i touches the tokens of that code and no others. Cached: as
the host; the bottleneck mixes no tokens. Our choice: it stands beside a mixer, on any frame (alone, beside
mha); in the warm-up a code that nothing uses becomes a used one, drawn by use, plus noise of the cluster's
width; ``straight_through`` hands x the gradient of the softmax over -|u - kappa|² in place of the argmin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.site import flag
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.registry import Card, register

DEAD = 0.05  # share of an even use below which a code is moved


class Bottleneck(Stage):
    """``y + s * out(x)``; see the module.

    Args:
        shape: C, K, d_c. width: d_v of a value. aggregate: "mean" or "concat" of the codebooks.
        warmup, decay: optimiser steps in which keys move, and a. straight: gradient to x.
    """

    def __init__(
        self,
        dim: int,
        shape: tuple[int, int, int],
        width: int,
        aggregate: str = "mean",
        init_std: float = 0.02,
        warmup: int = 0,
        decay: float = 0.99,
        straight: bool = False,
        detach: bool = True,
    ) -> None:
        super().__init__()
        C, K, d_c = self.shape = shape
        self.dim, self.width, self.aggregate = dim, width, aggregate
        self.warmup, self.decay, self.straight, self.detach = warmup, decay, straight, detach
        self.values = nn.Parameter(torch.randn(C, K, width) * init_std)
        self.gain = flag(nn.Parameter(torch.zeros(1)), decay=False)
        self.register_buffer("R", torch.randn(C, dim, d_c) * (2 / (dim + d_c)) ** 0.5)
        self.register_buffer("keys", torch.randn(C, K, d_c))
        self.register_buffer("counts", torch.zeros(C, K))
        self.register_buffer("sums", torch.zeros(C, K, d_c))
        self.register_buffer("frozen", torch.tensor(warmup == 0))
        self._moves = warmup > 0  # what `frozen` says, without a wait for the device

    def forward(self, y: Tensor, call: Call) -> Tensor:
        out, index, u = self.read(call.x)
        if self.training and self._moves and call.collects:
            self._report(index, u, call)
        return y + self.gain * out.to(y.dtype)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, T, D)`` -> out ``(B, T, d_v or C d_v)``, codes ``(C, B T)``, features ``(C, B T, d_c)``."""
        C = self.shape[0]
        with torch.autocast(x.device.type, enabled=False):  # rounding would choose other codes
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            rows = (x.detach() if self.detach else x).to(wide).flatten(0, 1)  # (B T, D)
            R, keys = self.R.to(wide), self.keys.to(wide)
            u = (rows @ R.transpose(0, 1).flatten(1)).unflatten(1, (C, -1)).transpose(0, 1)
            near = 2 * torch.baddbmm(-keys.square().sum(-1)[:, None] / 2, u, keys.mT)  # |u|² - distance²
            index = near.argmax(-1)
            values = self.values.to(wide)
            found = values.gather(1, index[..., None].expand(-1, -1, self.width))  # (C, B T, d_v)
            if self.straight:
                # the values keep the gradient of the lookup
                soft = near.softmax(-1) @ values.detach()
                found = found + soft - soft.detach()
            out = found.mean(0) if self.aggregate == "mean" else found.transpose(0, 1).flatten(1)
        return out.unflatten(0, x.shape[:2]), index, u

    @torch.no_grad()
    def _report(self, index: Tensor, u: Tensor, call: Call) -> None:
        line, (C, K, d_c) = call.line, self.shape
        seen = torch.ones(u.shape[1], dtype=u.dtype, device=u.device)
        if line.valid is not None:
            seen = line.valid.flatten().to(u.dtype)
        place = (index + torch.arange(C, device=u.device)[:, None] * K).flatten()
        counts = u.new_zeros(C * K).index_add_(0, place, seen.repeat(C))
        sums = u.new_zeros(C * K, d_c).index_add_(0, place, (u * seen[:, None]).flatten(0, 1))
        far = u - self.keys.to(u.dtype).gather(1, index[..., None].expand(-1, -1, d_c))
        spread = (far.square().mean(-1) * seen).sum(-1) / seen.sum().clamp(min=1)
        call.step("dkvb/counts", counts.view(C, K))
        call.step("dkvb/sums", sums.view(C, K, d_c))
        call.step("dkvb/spread", spread)
        call.stat("dkvb/used", (counts > 0).to(u.dtype).mean())

    @torch.no_grad()
    def on_step(self, step: int, stats: Mapping[str, Tensor], generator: torch.Generator) -> None:
        """Moves the keys to the running means of what they stand for, until the warm-up is over."""
        if not self._moves or "dkvb/counts" not in stats:
            return
        if bool(self.frozen):  # weights of a run whose warm-up is over
            self._moves = False
            return
        new = {name: stats[f"dkvb/{name}"].to(self.keys) for name in ("counts", "sums", "spread")}
        self.counts.lerp_(new["counts"], 1 - self.decay)
        self.sums.lerp_(new["sums"], 1 - self.decay)
        used = self.counts > 0
        means = self.sums / self.counts.clamp(min=1e-30)[..., None]
        self.keys.copy_(torch.where(used[..., None], means, self.keys))
        self._reseed(new["spread"], generator)
        if step >= self.warmup:
            self.frozen.fill_(True)
            self._moves = False

    def _reseed(self, spread: Tensor, generator: torch.Generator) -> None:
        """Codes without use become noisy copies of used ones, and share their counts."""
        for c, share in enumerate(self.counts.cpu().double()):
            dead = share < DEAD * share.mean()
            n = int(dead.sum())
            if n == 0 or not bool(share.sum() > 0):
                continue
            alive = torch.where(dead, 0.0, share)
            source = torch.multinomial(alive, n, replacement=True, generator=generator)
            noise = torch.randn(n, self.shape[2], generator=generator).to(self.keys)
            source, dead = source.to(self.keys.device), dead.to(self.keys.device)
            heirs = torch.bincount(source, minlength=self.shape[1]).to(self.keys) + 1
            self.counts[c] /= heirs
            self.sums[c] /= heirs[:, None]
            self.keys[c, dead] = self.keys[c, source] + noise * spread[c].sqrt()
            self.counts[c, dead] = self.counts[c, source]
            self.sums[c, dead] = self.keys[c, dead] * self.counts[c, source][:, None]

    def work(self, length: int) -> Iterable[Work]:
        C, K, d_c = self.shape
        yield Work("projections", "codebook features", 2 * length * self.dim * C * d_c)
        yield Work("mixing", "nearest keys", 2 * length * C * K * d_c)
        if self.straight:
            yield Work("mixing", "soft lookup", 2 * length * C * K * self.width)

    def elementwise(self) -> dict[str, float]:
        return {"values": float(self.shape[0] * self.width)}


@register(
    Card(
        name="discrete_kv_bottleneck",
        title="Discrete key-value bottleneck",
        paper="Discrete Key-Value Bottleneck",
        arxiv="2207.11240",
        family="beyond",
        summary="Beside the mixer, features snap to frozen keys of some codebooks and return learned values.",
        cached="as the host: the bottleneck mixes no tokens",
        claims=(
            Claim(
                "less forgetting; no claim on language", where="class-incremental CIFAR on a frozen encoder"
            ),
        ),
        small={"num_codebooks": 3, "num_keys": 5, "dim_key": 4},
    ),
    frames=("score", "recurrent", "own"),
)
def discrete_kv_bottleneck(
    draft: Draft,
    *,
    num_codebooks: int = 8,
    num_keys: int = 256,
    dim_key: int | None = None,
    warmup_steps: int = 100,
    ema_decay: float = 0.99,
    aggregate: Literal["mean", "concat"] = "mean",
    detach_input: bool = True,
    straight_through: bool = False,
    init_std: float = 0.02,
) -> None:
    """Adds the bottleneck to the output.

    Args:
        num_codebooks: C, at least 1. num_keys: K per codebook, at least 2.
        dim_key: d_c, up to D; default min(8, D).
        warmup_steps: optimiser steps in which keys follow the features; 0 freezes them as drawn.
        ema_decay: a, in [0, 1).
        aggregate: mean of values as wide as the stream, or C values of D / C side by side.
        detach_input: no gradient to x through the features.
        straight_through: gradient to x of the softmax over distances; needs ``detach_input=false``.
        init_std: of the values.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: the host at the start (s = 0).
    """
    D = draft.dim
    d_c = min(8, D) if dim_key is None else dim_key
    if num_codebooks < 1:
        raise ValueError(f"num_codebooks: must be at least 1, got {num_codebooks}")
    if num_keys < 2:
        raise ValueError(f"num_keys: one key is a constant, must be at least 2, got {num_keys}")
    if not 1 <= d_c <= D:
        raise ValueError(f"dim_key: must be in 1..dim={D}, got {d_c}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps: must be at least 0, got {warmup_steps}")
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay: must be in [0, 1), got {ema_decay}")
    if init_std <= 0:
        raise ValueError(f"init_std: must be positive, got {init_std}")
    if aggregate == "concat" and D % num_codebooks:
        raise ValueError(
            f"num_codebooks: concatenated values must fill dim={D}, got {num_codebooks}; "
            "choose a divisor or aggregate=mean"
        )
    if straight_through and detach_input:
        raise ValueError(
            "straight_through: needs the gradient that detach_input stops, got true; set detach_input=false"
        )
    width = D if aggregate == "mean" else D // num_codebooks
    sizes = (num_codebooks, num_keys, d_c)
    draft.put(
        "after",
        Bottleneck(
            D, sizes, width, aggregate, init_std, warmup_steps, ema_decay, straight_through, detach_input
        ),
    )
