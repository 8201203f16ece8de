"""mega against its equations token by token, its identities, and rows that are padding throughout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.attention.base import Mixer
from attnzoo.context import Context
from tiny import D, T, same, tokens
from zoo.test_hybrid import affine, build, norm, silu


def average(ema: Any, x: Tensor) -> Tensor:
    """The moving average as its recurrence, or, truncated, as its sum over lags, ``(T, D)``."""
    p = torch.sigmoid(ema.delta)
    q, h, outs = 1 - p * torch.sigmoid(ema.alpha), torch.zeros_like(p), []
    if ema.truncation:
        for t, row in enumerate(x):
            lags = range(min(ema.truncation, t + 1))
            h = sum(q**m * p * ema.beta * x[t - m][:, None] for m in lags)
            outs.append((ema.gamma * h).sum(1) / math.sqrt(ema.states) + ema.omega * row)
        return torch.stack(outs)
    for row in x:
        h = q * h + p * ema.beta * row[:, None]
        outs.append((ema.gamma * h).sum(1) / math.sqrt(ema.states) + ema.omega * row)
    return torch.stack(outs)


def turned(vector: Tensor, place: int) -> Tensor:
    half = len(vector) // 2
    angle = torch.tensor([place * 10000 ** (-2 * f / len(vector)) for f in range(half)]).double()
    a, b = vector[:half], vector[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])


def rms(z: Tensor, gain: Tensor) -> Tensor:
    return z / (z.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def mega(
    mixer: Mixer,
    x: Tensor,
    stream: Tensor,
    act: str,
    chunk: int | None,
    table: int,
    window: int | None = None,
) -> Tensor:
    core, n = mixer.core, norm(x, mixer.core.ln_gain, mixer.core.ln_bias)
    m = silu(average(core.ema, n))
    v = silu(affine(n, core.value))
    u, z, r, c = affine(m, core.mixed).split(core.parts, dim=-1)
    u, z, r = torch.sigmoid(u), silu(z), silu(r)
    q, k = (z * core.gamma_z[i] + core.beta_z[i] for i in (0, 1))
    if core.norm is not None:
        q, k = rms(q, core.norm.q_gain), rms(k, core.norm.k_gain)
    outs = []
    for i in range(len(x)):
        start = i // chunk * chunk if chunk else 0
        seen = range(max(start, i + 1 - window) if window else start, i + 1)
        scale = 1 / math.sqrt(core.z_dim) if act == "softmax" else 1 / len(seen)
        s = []
        for j in seen:
            if core.bias.appended:
                bias = turned(core.bias.a, i - start) @ turned(core.bias.b, j - start)
            else:
                bias = core.bias.table[table - 1 + j - i]
            s.append(q[i] @ k[j] * scale + bias)
        s = torch.stack(s)
        if act == "softmax":
            a = s.exp() / s.exp().sum()
        elif act == "laplace":
            a = 0.5 * (1 + torch.erf((s - 0.707107) / (0.282095 * math.sqrt(2))))
        else:
            a = s.clamp(min=0) ** 2
        o = sum(w * v[j] for w, j in zip(a, seen, strict=True))
        h = silu(c[i] + affine(o * r[i], mixer.out.hidden))
        outs.append(u[i] * (h - stream[i]))
    return torch.stack(outs)


@pytest.mark.parametrize("bias", ["simple", "rotary"])
@pytest.mark.parametrize("act", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_mega_by_its_equations(act: str, bias: str, chunk: int | None) -> None:
    options = {"attn_act": act, "rel_pos_bias": bias, "attn_chunk": chunk, "ema_dim": 3, "max_seq_len": 20}
    mixer, x, stream = build("mega", **options), tokens(2, 13, D), tokens(2, 13, D)
    want = [mega(mixer, a, b, act, chunk, chunk or 20) for a, b in zip(x, stream, strict=True)]
    torch.testing.assert_close(mixer(x, Context(residual=stream)), torch.stack(want), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("bias", ["simple", "rotary"])
@pytest.mark.parametrize("act, chunk, window", [("softmax", None, 3), ("relu2", 7, 5), ("laplace", 4, 6)])
def test_mega_in_a_window_with_normed_queries(act: str, chunk: int | None, window: int, bias: str) -> None:
    options = {"attn_act": act, "rel_pos_bias": bias, "attn_chunk": chunk, "window": window, "qk_norm": True}
    mixer, x = build("mega", ema_dim=3, **options), tokens(1, 13, D)
    want = mega(mixer, x[0], x[0], act, chunk, min(chunk or window, window), window)
    torch.testing.assert_close(mixer(x)[0], want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("truncation", [1, 5, 40])
def test_mega_truncated_average(truncation: int) -> None:
    mixer = build("mega", ema_dim=3, max_seq_len=40, truncation=truncation)
    x, whole = tokens(2, 37, D), build("mega", ema_dim=3, max_seq_len=40)
    want = torch.stack([mega(mixer, row, row, "softmax", None, 40) for row in x])
    torch.testing.assert_close(mixer(x), want, rtol=1e-8, atol=1e-9)
    whole.load_state_dict(mixer.state_dict())
    gap = (whole(x) - want).abs().amax((0, 2))
    assert (gap[:truncation] < 1e-12).all() and (truncation >= 37 or (gap[truncation:] > 1e-6).all())
    ids = torch.tensor([[1] * 9 + [2] * 28, [3] * 30 + [0] * 7])
    packed, cache, parts = mixer(x, Context(segment_ids=ids)), mixer.new_cache(2, 37), []
    torch.testing.assert_close(packed[0, 9:], mixer(x[:1, 9:])[0], rtol=1e-8, atol=1e-9)
    for part, own in zip(x.split([4, 1, 1, 20, 11], dim=1), ids.split([4, 1, 1, 20, 11], dim=1), strict=True):
        parts.append(mixer(part, Context(segment_ids=own), cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), packed, rtol=1e-8, atol=1e-9)
    lockstep, cache = [], mixer.new_cache(2, 37)
    for part in x.split([4, 1, 1, 20, 11], dim=1):
        lockstep.append(mixer(part, cache=cache))
    torch.testing.assert_close(torch.cat(lockstep, dim=1), want, rtol=1e-8, atol=1e-9)


def test_mega_chunk_as_long_as_the_sequence_is_none() -> None:
    whole, chunked, x = build("mega", max_seq_len=T), build("mega", attn_chunk=T), tokens()
    chunked.load_state_dict(whole.state_dict())
    same(whole(x), chunked(x))


def test_mega_without_update_is_the_identity() -> None:
    mixer = build("mega")
    mixer.core.mixed.bias[:D] = -800.0
    assert float(mixer(tokens()).abs().max()) == 0.0


def test_mega_undamped_is_the_classic_average() -> None:
    mixer, x = build("mega", ema_dim=1), tokens(1, T, D)
    ema = mixer.core.ema
    for name, value in (("alpha", 60.0), ("beta", 1.0), ("gamma", 1.0), ("omega", 0.0)):
        getattr(ema, name).fill_(value)
    rate, mean = torch.sigmoid(ema.delta[:, 0]), torch.zeros(D).double()
    want = []
    for row in x[0]:
        mean = (1 - rate) * mean + rate * row
        want.append(mean)

    class Free:
        mem = type("M", (), {"state": staticmethod(lambda name: None)})
        line = type("L", (), {"doc": None})

    same(ema(x, Free)[0], torch.stack(want))


def test_mega_given_positions_shift_the_bias() -> None:
    for bias in ("simple", "rotary"):
        mixer, x = build("mega", rel_pos_bias=bias), tokens()
        positions = torch.arange(T)[None]
        same(mixer(x, Context(positions=positions + 1000)), mixer(x))
        stretched = mixer(x, Context(positions=3 * positions))
        assert float((stretched - mixer(x)).abs().max()) > 1e-6


@pytest.mark.parametrize("name", ["mano", "mega", "spectformer", "grassmann", "flare", "l2vit"])
def test_rows_that_are_padding_throughout(name: str) -> None:
    mixer = build(name, **({"layer_idx": 1, "num_layers": 2} if name == "l2vit" else {})).requires_grad_()
    ids = torch.ones(3, T, dtype=torch.long)
    ids[1], ids[2, :4] = 0, 0
    x = tokens(3, T, D).requires_grad_()
    y = mixer(x, Context(segment_ids=ids))
    assert (y[1] == 0).all()
    same(y[2:, 4:], mixer(x[2:, 4:]))
    grads = torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()], allow_unused=True)
    assert all(g is None or bool(g.isfinite().all()) for g in grads)
    with torch.no_grad():
        cache, parts = mixer.new_cache(3, T), []
        for part, own in zip(x.split([4, 1, 3, 1], dim=1), ids.split([4, 1, 3, 1], dim=1), strict=True):
            parts.append(mixer(part, Context(segment_ids=own), cache))
        same(torch.cat(parts, dim=1), y)
        fresh = 2 * torch.ones(3, T, dtype=torch.long)  # other documents after those, the middle row's first
        later = mixer.new_cache(3, 2 * T)
        mixer(x, Context(segment_ids=ids), later)
        same(mixer(x, Context(segment_ids=fresh), later), mixer(x))
