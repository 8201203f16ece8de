"""Hymba and RecurFormer against loops over tokens, head by head, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo import Context, registry
from attnzoo.attention.base import Mixer
from attnzoo.attention.hybrid.hymba import middle_and_ends, runs
from oracles import causal, rms, rotate, split
from tiny import D, H, T, same, tokens


def scattered(mixer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for param in mixer.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return mixer


def silu(z: Tensor) -> Tensor:
    return z / (1 + (-z).exp())


def softplus(z: Tensor) -> Tensor:
    return torch.log1p(z.exp())


def convolve(z: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """Causal, depthwise, then silu."""
    n = taps.shape[1]
    rows = []
    for t in range(len(z)):
        rows.append(bias + sum(taps[:, n - 1 - m] * z[t - m] for m in range(min(n, t + 1))))
    return silu(torch.stack(rows))


def mamba1(x: Tensor, core: nn.Module, normed: bool) -> Tensor:
    """``(T, D)`` -> ``(T, D_i)``."""
    u, z = (x @ core.in_proj.weight.T).chunk(2, dim=1)
    u = convolve(u, core.conv, core.conv_bias)
    dt, B, C = (u @ core.x_proj.weight.T).split(core.parts, dim=1)
    if normed:
        dt, B, C = (rms(a, g, 1e-6) for a, g in ((dt, core.dt_gain), (B, core.B_gain), (C, core.C_gain)))
    step = softplus(dt @ core.dt_proj.weight.T + core.dt_bias)
    h, ys = torch.zeros_like(core.A_log), []
    for t in range(len(x)):
        h = (-step[t][:, None] * core.A_log.exp()).exp() * h + torch.outer(step[t] * u[t], B[t])
        ys.append(h @ C[t] + core.D * u[t])
    return torch.stack(ys) * silu(z)


def mamba2(x: Tensor, mixer: Mixer, heads: int, states: int) -> Tensor:
    """``(T, D)`` -> ``(T, heads * P)``, gated and normed."""
    inner = mixer.project.sizes[0]
    z, v, k, q, dt = (x @ mixer.project.in_proj.weight.T).split([inner, inner, states, states, heads], dim=1)
    conv, gates, P = mixer.refine[0], mixer.gates, inner // heads
    q, k, v = (
        convolve(a, getattr(conv, f"conv_{n}"), getattr(conv, f"conv_{n}_bias"))
        for a, n in ((q, "q"), (k, "k"), (v, "v"))
    )
    step, outs = softplus(dt + gates.dt_bias), []
    skip = next(stage.D for stage in mixer.combine if hasattr(stage, "D"))
    gain = next(stage.gain for stage in mixer.combine if hasattr(stage, "gain"))
    for h in range(heads):
        S, rows, mine = torch.zeros(states, P).double(), [], v[:, h * P : (h + 1) * P]
        for t in range(len(x)):
            S = (-gates.A_log[h].exp() * step[t, h]).exp() * S + torch.outer(k[t], step[t, h] * mine[t])
            rows.append(S.T @ q[t] + skip[h] * mine[t])
        outs.append(torch.stack(rows))
    return rms(torch.cat(outs, dim=1) * silu(z), gain, 1e-6)


def attend(
    x: Tensor, w: list[Tensor], heads: int, kv: tuple[list[Tensor], list[Tensor]], seen: Tensor
) -> Tensor:
    q, (k, v) = split(x @ w[0].T, heads), kv
    outs = []
    for h in range(heads):
        g = h * len(k) // heads
        s = (rotate(q[h], 10000.0) @ rotate(k[g], 10000.0).T) / q[h].shape[1] ** 0.5
        outs.append(s.masked_fill(~seen, float("-inf")).softmax(1) @ v[g])
    return torch.cat(outs, dim=1)


def keys_of(x: Tensor, mixer: Mixer, groups: int) -> tuple[list[Tensor], list[Tensor]]:
    _, k, v = mixer.project.qkv_proj.weight.split(mixer.project.sizes)
    return split(x @ k.T, groups), split(x @ v.T, groups)


def hymba(
    x: Tensor, mixer: Mixer, source: tuple[Mixer, Tensor], window: int | None, meta: int, core: str
) -> Tensor:
    """One document ``(T, D)``; ``source``: the layer whose keys it reads, and that layer's input."""
    heads, ssm = mixer.core.branches
    keys = keys_of(source[1], source[0].core.branches[0], 2)
    if hasattr(heads.project, "q_proj"):
        weights = [heads.project.q_proj.weight]
    else:
        weights = [heads.project.qkv_proj.weight[:D]]
    o = rms(attend(x, weights, H, keys, causal(len(x), window, meta)), heads.combine[0].gain, 1e-6)
    if core == "mamba1":
        s = rms(mamba1(x, ssm.core, normed=True), ssm.combine[0].gain, 1e-6)
    else:
        s = mamba2(x, ssm, H, 3)
    return (o + s) / 2 @ mixer.out.out_proj.weight.T


def pair(core: str, depth: int = 2, **options: Any) -> list[Mixer]:
    place = {"num_layers": depth, "num_kv_heads": 2, "ssm_core": core, "state_size": 3} | options
    bank: dict[str, Any] = {}
    made = [registry.build("hymba", D, H, place | {"layer_idx": i}, bank) for i in range(depth)]
    return [scattered(mixer.double()) for mixer in made]


@torch.no_grad()
@pytest.mark.parametrize("core", ["mamba1", "mamba2"])
@pytest.mark.parametrize(
    "options, window, meta",
    [
        ({"global_layers": (), "window": 3, "num_meta_tokens": 2}, 3, 2),
        ({"global_layers": (), "window": 4}, 4, 0),
        ({"kv_share_groups": ()}, None, 0),
    ],
)
def test_hymba_equals_loops(core: str, options: dict[str, Any], window: int | None, meta: int) -> None:
    first, second = pair(core, **options)
    x, z = tokens(), tokens()
    ctx = Context()
    y = first(x, ctx), second(z, ctx)
    shares = hasattr(second.core.branches[0].project, "q_proj")
    assert shares == (window is not None)
    for b in range(2):
        source = (first, x[b]) if shares else (second, z[b])
        same(y[0][b], hymba(x[b], first, (first, x[b]), window, meta, core))
        same(y[1][b], hymba(z[b], second, source, window, meta, core))


@torch.no_grad()
def test_hymba_window_counts_the_token_itself() -> None:
    (mixer,) = pair("mamba1", depth=1, global_layers=(), window=3)
    mixer.core.branches[1].combine[0].gain.zero_()  # attention alone
    x = tokens()
    z = x.clone()
    z[:, 2] += 1
    moved = (mixer(x) - mixer(z)).abs().amax(dim=(0, 2))
    assert bool((moved[2:5] > 1e-9).all()) and bool((moved[5:] == 0).all())


@torch.no_grad()
def test_hymba_meta_tokens_stay_visible() -> None:
    (mixer,) = pair("mamba1", depth=1, global_layers=(), window=2, num_meta_tokens=2)
    mixer.core.branches[1].combine[0].gain.zero_()
    x = tokens()
    for place, stays in ((0, True), (1, True), (2, False)):
        z = x.clone()
        z[:, place] += 1
        assert bool(((mixer(x) - mixer(z))[:, 5:].abs() > 1e-9).any()) == stays
    assert mixer.new_cache(1, 100).slots["k"].shape[2] == 4


@torch.no_grad()
def test_a_hymba_branch_without_gain_leaves_half_of_the_other() -> None:
    (mixer,) = pair("mamba1", depth=1)
    x = tokens()
    halves = []
    for silent in (0, 1):
        gain = mixer.core.branches[silent].combine[0].gain
        kept = gain.clone()
        gain.zero_()
        halves.append(mixer(x))
        gain.copy_(kept)
    same(halves[0] + halves[1], mixer(x))


def test_hymba_default_groups_are_those_of_the_released_model() -> None:
    assert middle_and_ends(32) == (0, 15, 31)
    pairs = [[i, i + 1] for i in range(1, 15, 2)]
    later = [[16, 17, 18], *([i, i + 1] for i in range(19, 31, 2))]
    assert runs(32, (0, 15, 31)) == pairs + later
    assert runs(4, (0, 1, 3)) == [] and runs(3, ()) == [[0, 1, 2]] and runs(1, (0,)) == []


def test_hymba_costs() -> None:
    """In-projection D² (1 + 3 G/H + 4), output 2 D², and nothing cached by a layer that borrows."""
    D, H, G = 320, 10, 2
    place = {"num_layers": 2, "global_layers": (), "window": 8, "num_kv_heads": G, "state_size": 16}
    costs = [attnzoo.create("hymba", D, H, **place, layer_idx=i).cost(64) for i in range(2)]
    inner, rank = 2 * D, 20
    small = inner * (rank + 32) + rank * inner + 4 * inner + 16 * inner + 3 * inner + rank + 32 + 2 * inner
    assert costs[0].params == D * D * (1 + 3 * G / H + 4) + 2 * D * D + small
    assert costs[0].params - costs[1].params == D * D * 3 * G / H
    scan = 4 * inner * 16 + 2 * 3 * inner  # state in fp32, tail in bf16
    assert costs[1].state_bytes == scan and costs[1].cache_bytes_per_token == 0
    assert costs[0].state_bytes == scan + 2 * 8 * G * (D // H) * 3


@torch.no_grad()
@pytest.mark.parametrize("core", ["mamba1", "mamba2"])
@pytest.mark.parametrize(
    "options, chosen",
    [
        ({}, [2, 3]),
        ({"recurrent_fraction": 0.3}, [3]),
        ({"recurrent_heads": [3, 0]}, [0, 3]),
        ({"recurrent_heads": [0, 1], "num_kv_heads": 2}, [0, 1]),
        ({"recurrent_fraction": 1.0}, [0, 1, 2, 3]),
        ({"window": 3, "n_sink": 1}, [2, 3]),
    ],
)
def test_recurformer_equals_loops(core: str, options: dict[str, Any], chosen: list[int]) -> None:
    mixer = attnzoo.create("recurformer", D, H, core=core, state_size=3, **options).double()
    x, rest = tokens(), [h for h in range(H) if h not in chosen]
    scattered(mixer)
    branches, G, width = mixer.core.branches, options.get("num_kv_heads", H), D // H
    seen = causal(T, options.get("window"), options.get("n_sink", 0))
    for row, y in zip(x, mixer(x), strict=True):
        heads = torch.zeros(T, H, width).double()
        if rest:
            keys = keys_of(row, branches[0], G * len(rest) // H)
            weights = [branches[0].project.qkv_proj.weight[: len(rest) * width]]
            heads[:, rest] = attend(row, weights, len(rest), keys, seen).unflatten(1, (-1, width))
        inner = branches[-1]
        o = mamba1(row, inner.core, normed=False) if core == "mamba1" else mamba2(row, inner, len(chosen), 3)
        heads[:, chosen] = o.unflatten(1, (-1, width))
        same(y, heads.flatten(1) @ mixer.out.out_proj.weight.T)


@torch.no_grad()
def test_recurformer_reduces_to_mha() -> None:
    mixer = scattered(attnzoo.create("recurformer", D, H, recurrent_fraction=0.0).double())
    plain = attnzoo.create("mha", D, H).double()
    plain.project.qkv_proj.weight.copy_(mixer.core.branches[0].project.qkv_proj.weight)
    plain.out.out_proj.weight.copy_(mixer.out.out_proj.weight)
    x = tokens()
    same(mixer(x), plain(x))


def test_recurformer_cache_shrinks_with_the_fraction() -> None:
    costs = [
        attnzoo.create("recurformer", 64, 8, recurrent_fraction=f).cost(16) for f in (0.0, 0.25, 0.75, 1.0)
    ]
    assert [c.cache_bytes_per_token for c in costs] == [2 * 2 * 8 * n for n in (8, 6, 2, 0)]
    assert costs[0].state_bytes == 0 < costs[1].state_bytes < costs[2].state_bytes


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("hymba", {"window": 0}, r"window: must be at least 1, got 0"),
        ("hymba", {"num_meta_tokens": -1}, r"num_meta_tokens: must be at least 0, got -1"),
        ("hymba", {"v_expand": 0}, r"v_expand: must be at least 1, got 0"),
        ("hymba", {"global_layers": [4]}, r"global_layers: must be layers below num_layers=4, got \[4\]"),
        ("hymba", {"kv_share_groups": [[0, 1]]}, r"kv_share_groups: a global layer.*got \[0, 1\]"),
        (
            "hymba",
            {"kv_share_groups": [[1, 3]], "global_layers": []},
            r"kv_share_groups: must be runs.*\[1, 3\]",
        ),
        (
            "hymba",
            {"kv_share_groups": [[0, 1], [1, 2]], "global_layers": []},
            r"no layer twice, got \[1, 2\]",
        ),
        ("hymba", {"kv_share_groups": [[3, 4]], "global_layers": []}, r"layers below 4.*got \[3, 4\]"),
        ("hymba", {"num_kv_heads": 3}, r"num_kv_heads: .*got 3"),
        ("hymba", {"state_size": 0}, r"state_size: must be at least 1, got 0"),
        ("hymba", {"dt_rank": 0}, r"dt_rank: must be at least 1, got 0"),
        ("hymba", {"conv_kernel": 0}, r"conv_kernel: must be at least 1, got 0"),
        ("recurformer", {"recurrent_fraction": 1.5}, r"recurrent_fraction: must be in \[0, 1\], got 1.5"),
        (
            "recurformer",
            {"recurrent_heads": [4]},
            r"recurrent_heads: must be heads below num_heads=4.*got \[4\]",
        ),
        ("recurformer", {"recurrent_heads": [1, 1]}, r"recurrent_heads: .*each once, got \[1, 1\]"),
        (
            "recurformer",
            {"num_kv_heads": 2, "recurrent_fraction": 0.25},
            r"recurrent_fraction: must make whole key groups of 2 heads recurrent, got 0.25",
        ),
        (
            "recurformer",
            {"num_kv_heads": 2, "recurrent_heads": [1, 2]},
            r"recurrent_heads: must make whole key",
        ),
        ("recurformer", {"num_kv_heads": 3}, r"num_kv_heads: must divide num_heads=4, got 3"),
        ("recurformer", {"recurrent_fraction": 1.0, "impl": "sdpa"}, r"impl: 'sdpa' does not run a scan"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attnzoo.create(name, D, H, num_layers=4, **options)
