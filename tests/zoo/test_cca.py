"""Compressed convolutional attention against its equations, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.attention.base import Mixer
from attnzoo.context import Context
from golden import load_spec_weights
from oracles import attend, causal, rotate, split
from test_golden import CASES, close
from test_refusals import named, run
from tiny import D, H, T, build, same, tokens

G, d = 2, 4

REFUSED = [
    ("ccgqa", {"num_kv_heads": 3}, "num_kv_heads", 3),
    ("ccgqa", {"num_kv_heads": 1, "head_dim": 3, "pos": "none"}, "head_dim", 3),
    ("cca", {"head_dim": 3}, "head_dim", 3),
    ("cca", {"conv_kernels": (2, 0)}, "conv_kernels", 0),
    ("cca", {"conv_kernels": (2,)}, "conv_kernels", 2),
    ("cca", {"temp": "none"}, "temp", "none"),
    ("cca", {"add": ("mla",)}, "add", "mla"),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=named(REFUSED))
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: .{{15,}}") as caught:
        attnzoo.create(name, D, H, **options)
    assert str(value) in str(caught.value)


def scattered(**options: Any) -> Mixer:
    """Every bias, tap and temperature away from its start."""
    mixer = build("ccgqa", num_kv_heads=G, head_dim=d, **options)
    for name, param in mixer.named_parameters():
        if param.dim() == 1 or "conv" in name:
            param.normal_()
    return mixer


def convolved(u: Tensor, conv: Any) -> Tensor:
    """Both convolutions of ``(T, C)``, zeros put before u once, tap by tap."""
    (first, second), C = conv.kernels, u.shape[1]
    pad = first + second - 2
    padded = torch.cat([torch.zeros(pad, C).double(), u])
    between = torch.stack(
        [
            sum(padded[t - first + 1 + m] * conv.conv1[:, m] for m in range(first)) + conv.bias1
            for t in range(first - 1, len(padded))
        ]
    )
    rows = []
    for t in range(second - 1, len(between)):
        row = conv.bias2.clone()
        for c in range(C):
            head = slice(c // d * d, c // d * d + d)
            for m in range(second):
                row[c] += between[t - second + 1 + m, head] @ conv.conv2[c, :, m]
        rows.append(row)
    return torch.stack(rows)


def oracle(x: Tensor, mixer: Mixer, conv: bool, mean: bool, shift: bool, norm: bool, temp: str) -> Tensor:
    """``(T, D)`` of one document."""
    stages = {type(stage).__name__: stage for stage in mixer.refine}
    weight = mixer.project.qkv_proj.weight
    bias = 0.0 if mixer.project.qkv_proj.bias is None else mixer.project.qkv_proj.bias
    z = x @ weight.T + bias
    u, v = z[:, : (H + G) * d], z[:, (H + G) * d :].clone()
    if shift:
        half = G * d // 2
        v[1:, half:] = v[:-1, half:].clone()
        v[0, half:] = 0.0 if isinstance(bias, float) else bias[-half:]
    raw = split(u, H + G)
    new = split(convolved(u, stages["QKConv"]) if conv else u, H + G)
    if mean:
        for h in range(H):
            new[h] = new[h] + (raw[h] + raw[H + h * G // H]) / 2
        for g in range(G):
            own = [raw[h] for h in range(H) if h * G // H == g]
            new[H + g] = new[H + g] + (sum(own) / len(own) + raw[H + g]) / 2
    if "QKNorm" in stages:
        gains = [stages["QKNorm"].q_gain] * H + [stages["QKNorm"].k_gain] * G
        new = [
            z / (z.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * w for z, w in zip(new, gains, strict=True)
        ]
    if norm:
        new = [math.sqrt(d) * z / z.norm(dim=1, keepdim=True) for z in new]
        tau = stages["SphereNorm"].tau
        for g in range(G):
            new[H + g] = new[H + g] * (math.exp(min(float(tau[g]), 2.0)) if temp == "exp" else tau[g])
    q, k = ([rotate(z, 10000.0) for z in zs] for zs in (new[:H], new[H:]))
    return attend(q, k, split(v, G), causal(len(x))).flatten(1) @ mixer.out.out_proj.weight.T


TOGGLES = ["conv", "qk_mean", "value_shift", "unit_norm"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv_kernels": (3, 2)},
        {"conv_kernels": (1, 4), "temp": "linear"},
        {"qkv_bias": True},
        {"qk_norm": True},
        *({name: False} for name in TOGGLES),
        dict.fromkeys(TOGGLES[:3], False),
    ],
    ids=lambda options: "-".join(map(str, options)) or "default",
)
def test_ccgqa_token_by_token(options: dict[str, Any]) -> None:
    mixer, x = scattered(**options), tokens()
    on = [options.get(name, True) for name in TOGGLES]
    y = mixer(x)
    for row, got in zip(x, y, strict=True):
        same(got, oracle(row, mixer, *on, options.get("temp", "exp")))
    same(run(mixer, x, [1, 4, 1, 3]), y)
    packed = mixer(x, Context(segment_ids=torch.tensor([[1, 2, 2, 2, 3, 3, 3, 3, 3]] * 2)))
    for b, (start, stop) in ((0, (1, 4)), (1, (4, T)), (0, (0, 1))):
        same(packed[b, start:stop], oracle(x[b, start:stop], mixer, *on, options.get("temp", "exp")))


def test_cca_pads_once_so_that_the_first_token_sees_the_bias() -> None:
    mixer, x = scattered(), tokens(1, T, D)
    conv, u = mixer.refine[0], torch.randn(T, (H + G) * d, dtype=torch.float64)
    once = convolved(u, conv)
    between = torch.nn.functional.conv1d(
        torch.nn.functional.pad(u.T[None], (1, 0)), conv.conv1[:, None], conv.bias1, groups=(H + G) * d
    )
    each = torch.nn.functional.conv1d(
        torch.nn.functional.pad(between, (1, 0)), conv.conv2, conv.bias2, groups=H + G
    )[0].T
    same(each[1:], once[1:])
    assert not torch.allclose(each[0], once[0]), "padding between the two should show at the first token"
    before = mixer(x)
    conv.bias1.zero_()
    assert not torch.allclose(mixer(x), before)


def test_cca_reduces_to_gqa_in_fewer_channels() -> None:
    off = dict.fromkeys(TOGGLES, False)
    mixer, gqa = build("ccgqa", num_kv_heads=G, head_dim=2, **off), build("gqa", num_kv_heads=G, head_dim=2)
    gqa.load_state_dict(mixer.state_dict())
    x = tokens()
    same(mixer(x), gqa(x))


def test_ccgqa_with_all_key_heads_is_cca() -> None:
    mixer, x = build("ccgqa", num_kv_heads=H), tokens()
    cca = build("cca")
    cca.load_state_dict(mixer.state_dict())
    same(cca(x), mixer(x))


def test_cca_lengths_are_fixed_and_temperatures_bounded() -> None:
    mixer = scattered()
    norm = mixer.refine[1]
    norm.tau.copy_(torch.tensor([5.0, -0.5]))
    q, k = torch.randn(1, H, T, d).double(), torch.randn(1, G, T, d).double()
    q, k, _ = norm(q, k, k, None)
    same(q.norm(dim=-1), torch.full((1, H, T), math.sqrt(d)).double())
    same(k.norm(dim=-1)[0, :, 0], math.sqrt(d) * torch.tensor([2.0, -0.5]).double().exp())


def test_cca_without_taps_keeps_the_mean() -> None:
    mixer = scattered()
    for param in mixer.refine[0].parameters():
        param.zero_()
    q, k = torch.randn(1, H, T, d).double(), torch.randn(1, G, T, d).double()
    call = type("Call", (), {})()
    call.impl, call.line = "auto", type("Line", (), {"doc": None, "order": torch.arange(T)[None]})()
    call.mem = type("Mem", (), {"cache": None, "alone": True})()
    call.mem.tail = lambda name, z, n: torch.nn.functional.pad(z, (0, 0, n, 0))
    new_q, new_k, _ = mixer.refine[0](q, k, k, call)
    same(new_q[0, 3], (q[0, 3] + k[0, 1]) / 2)
    same(new_k[0, 0], ((q[0, 0] + q[0, 1]) / 2 + k[0, 0]) / 2)


@pytest.mark.parametrize("name", ["cca", "ccgqa"])
def test_linear_temperature_is_the_exponential_of_the_other(name: str) -> None:
    case = CASES[name]
    weights = case.weights | {"tau": case.weights["tau"].exp()}
    options = case.options | {"temp": "linear"}
    mixer = case._replace(weights=weights, options=options).mixer()
    close(load_spec_weights(mixer, weights)(case.x), case.y)


def test_default_widths_halve_the_stream() -> None:
    assert attnzoo.create("cca", 512, 8).project.widths[0] == 32
    assert attnzoo.create("ccgqa", 512, 8).project.heads == (8, 2, 2)
