"""The family ``recurrence``: what it reduces to, where it starts, what it refuses, what goes on top of it."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.attention.base import Mixer
from attnzoo.context import Context
from attnzoo.testing import Subject, check

D, H, T = 32, 4, 13
NAMES = attnzoo.list_variants(family="recurrence")


def made(name: str, **options: Any) -> Mixer:
    """A mixer with scattered parameters, fp64."""
    torch.manual_seed(0)
    mixer = attnzoo.create(name, D, H, **options).double().requires_grad_(False)
    for param in mixer.parameters():
        param.add_(0.3 * torch.randn_like(param))
    return mixer


def tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, T, D)), dtype=torch.float64)


def heads(mixer: Mixer, x: Tensor) -> Tensor:
    """Outputs before W_o and without what follows the first step of the read-out."""
    mixer.combine = mixer.combine[:1]
    mixer.out = torch.nn.Identity()
    mixer.out.forward = lambda o, call: o.flatten(2)
    return mixer(x)


def take(source: Mixer, target: Mixer, *parts: str) -> None:
    """``target`` gets the parameters of ``source`` whose names begin so."""
    weights = {n: p for n, p in source.state_dict().items() if n.startswith(parts)}
    assert weights and weights.keys() <= target.state_dict().keys()
    target.load_state_dict(target.state_dict() | weights)


def same(a: Tensor, b: Tensor, tight: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tight, atol=tight)


def test_the_family_is_complete() -> None:
    mine = {
        "deltanet",
        "gla",
        "hgrn2",
        "kda",
        "lightning_attention",
        "log_linear",
        "mamba2",
        "retnet",
        "rwkv7",
    }
    assert mine <= set(NAMES)


def test_retnet_that_keeps_everything_is_unnormalised_linear_attention() -> None:
    retnet = made("retnet", pos="none", expand_v=1.0, norm_affine=True)
    linear = made("linear", pos="none", feature_map="identity", normalize=False)
    take(retnet, linear, "project")
    retnet.gates.logs = torch.zeros_like
    take(retnet, linear, "combine.0")
    x = tokens()
    same(heads(retnet, x), heads(linear, x))


def test_retnet_knows_distances_only() -> None:
    mixer, x = made("retnet"), tokens()
    same(mixer(x, Context(positions=torch.arange(T)[None] + 1000)), mixer(x))


def test_retnet_forgets_by_gamma_per_step() -> None:
    mixer = made("retnet")
    logs = mixer.gates(*(torch.zeros(1, 1, H, 2).double() for _ in "qkv"), None).g
    same(logs.exp(), 1 - 2.0 ** (-5 - torch.arange(H).double()))


def test_lightning_slopes_flatten_to_nothing_in_the_last_layer() -> None:
    def logs(layer: int) -> Tensor:
        mixer = attnzoo.create("lightning_attention", D, H, layer_idx=layer, num_layers=5)
        return mixer.gates(*(torch.zeros(1, 1, H, 2).double() for _ in "qkv"), None).g

    slopes = [logs(layer) for layer in range(5)]
    same(slopes[0], -(2.0 ** (-2 * torch.arange(1, 5).double())) * (1 + 1e-5), 1e-12)
    assert all((a < b).all() for a, b in pairwise(slopes))
    assert (slopes[-1] > -2e-5).all()


def test_gla_with_open_gates_is_unnormalised_linear_attention() -> None:
    gla = made("gla", head_dim=D // H)
    linear = made("linear", pos="none", feature_map="identity", normalize=False)
    take(gla, linear, "project", "combine.0")
    gla.gates.up.bias.fill_(60.0)
    x = tokens()
    same(heads(gla, x), heads(linear, x))


def test_deltanet_is_gated_deltanet_that_forgets_nothing() -> None:
    delta = made("deltanet")
    gated = made("gated_deltanet", head_dim=D // H, expand_v=1.0, use_gate=False)
    take(delta, gated, "project", "refine", "combine", "out", "gates.beta")
    gated.gates.A_log.fill_(-60.0)
    x = tokens()
    same(delta(x), gated(x))


def test_kda_with_equal_channels_is_gated_deltanet() -> None:
    kda, gated = made("kda"), made("gated_deltanet", head_dim=D // H, expand_v=1.0)
    take(kda, gated, "project", "refine", "combine.0", "gates.beta", "gates.A_log")
    kda.gates.up.weight.zero_()
    kda.gates.dt_bias.copy_(gated.gates.dt_bias.repeat_interleave(D // H))
    gated.gates.decay.weight.zero_()
    x = tokens()
    same(heads(kda, x), heads(gated, x))


def test_hgrn2_states_are_averages_of_values() -> None:
    mixer, x = made("hgrn2", layer_idx=2, num_layers=3), tokens(2, 60, D)
    cache = mixer.new_cache(2, 60)
    mixer(x, cache=cache)
    v = mixer.project.qkv(x, None)[2]
    assert (cache.slots["S"].abs() <= v.abs().amax(2)[:, :, None]).all()


def test_hgrn2_bounds_rise_with_depth_from_one_parameter_of_the_model() -> None:
    model = attnzoo.create_model("hgrn2", vocab_size=16, dim=D, depth=4, num_heads=H)
    bounds = [mixer.refine[0].bounds for mixer in model.mixers]
    assert bounds[0] is None and bounds[1] is bounds[2] is bounds[3]
    assert sum("Gamma" in name for name, _ in model.named_parameters()) == 1
    low = [bounds[3].logs(layer, torch.float64)[0].exp() for layer in (1, 2, 3)]
    same(torch.stack(low)[:, 0], torch.tensor([0.25, 0.5, 0.75]).double())
    with torch.no_grad():
        bounds[1].Gamma.add_(200 * torch.randn(4, D))
    tokens_, target = torch.randint(16, (2, 9)), torch.randint(16, (2, 9))
    loss = torch.nn.functional.cross_entropy(model(tokens_).flatten(0, 1), target.flatten())
    loss.backward()
    assert bounds[1].Gamma.grad.isfinite().all()  # bounds all but 0 and 1


def test_mamba2_without_steps_writes_nothing_and_forgets_nothing() -> None:
    mixer, x = made("mamba2", state_size=4), tokens()
    cache = mixer.new_cache(2, 2 * T)
    mixer(x, cache=cache)
    before = cache.slots["S"].clone()
    mixer.gates.dt_bias.fill_(-80.0)
    mixer(x, cache=cache)
    same(cache.slots["S"], before, 1e-12)


def test_mamba2_gates_before_it_normalises() -> None:
    mixer, x = made("mamba2", state_size=4), tokens()
    for stage in mixer.combine:
        stage.eps = 0.0
    y = mixer(x)
    inner = 2 * D
    mixer.project.in_proj.weight[:inner] *= 0  # z = 0, and so no output, in every channel but the first
    mixer.project.in_proj.weight[0] += 1
    o = mixer.out.out_proj.weight[:, :1] * mixer.combine[2].gain[0] * inner**0.5
    z = mixer(x)
    assert not torch.allclose(y, z)
    same(z.abs(), o.T.abs().expand_as(z))  # one channel left: its norm is a sign


@pytest.mark.parametrize("by", [{"num_heads": 8, "head_dim": 16}, {"num_heads": 1, "head_dim": 16}])
def test_head_dim_of_mamba2_and_rwkv7_says_how_many_heads(by: dict[str, int]) -> None:
    assert attnzoo.create("mamba2", D, **by).scan.shape == (4, 128, 16)
    assert attnzoo.create("rwkv7", D, **by).scan.shape == (2, 16, 16)


def test_rwkv7_starts_as_released() -> None:
    L, n, d = 5, 2, 8
    mixer = attnzoo.create("rwkv7", D, H, layer_idx=n, num_layers=L)
    gates, project, norm = mixer.gates, mixer.project, mixer.combine[0]
    for c in (0, 7, 19, 31):
        lin, z = c / (D - 1) - 0.5, ((c % d) - (d - 1) / 2) / ((d - 1) / 2)
        zz = z * abs(z)
        decay = -6 + 6 * (c / (D - 1)) ** (1 + (n / (L - 1)) ** 0.3) + 0.5 + 2.5 * zz
        want = {"w0": decay, "a0": -0.19 + 0.3 * zz + 0.4 * lin, "k_k": 0.71 - 0.1 * lin, "k_a": 1.02}
        for name, value in want.items():
            assert getattr(gates, name)[c].item() == pytest.approx(value, abs=1e-5), name
        assert project.v0[c].item() == pytest.approx(0.73 - 0.4 * lin, abs=1e-6)
        for i, eps in enumerate((0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
            assert project.mu[i, c].item() == pytest.approx(1 - (c / D) ** (eps * (1 - n / L)), abs=1e-6)
    assert norm.gain.unique().item() == pytest.approx(((n + 1) / L) ** 0.7)
    assert norm.r_k.unique().item() == pytest.approx(-0.04) and not mixer.out.out_proj.weight.any()
    assert not gates.decay.down.weight.any()
    same(gates.decay.up.weight.T @ gates.decay.up.weight, 0.01 * torch.eye(D), 1e-5)
    assert project.k.weight.abs().max() <= 0.05 / D**0.5 < project.r.weight.abs().max() <= 0.5 / D**0.5


def test_rwkv7_asks_for_its_learning_rate_and_no_decay_of_vectors() -> None:
    mixer = attnzoo.create("rwkv7", D, H, layer_idx=1, num_layers=2)
    assert mixer.gates.w0.lr_scale == 2.0 and mixer.gates.a0.lr_scale == 1.0
    for name, param in mixer.named_parameters():
        vector = param.dim() < 2 or name.endswith((".mu", ".r_k"))
        assert getattr(param, "no_weight_decay", False) == vector, name
        assert getattr(param, "no_reinit", False), name


def test_rwkv7_without_first_values_says_what_is_missing() -> None:
    mixer = attnzoo.create("rwkv7", D, H, layer_idx=1, num_layers=2)
    with pytest.raises(ValueError, match=r"v_first: layer 1 .*got none"):
        mixer(torch.randn(1, 3, D))
    with pytest.raises(ValueError, match=r"v_first: must be .*\(1, 3, 32\), got \(1, 2, 32\)"):
        mixer(torch.randn(1, 3, D), Context(shared={"v_first": torch.randn(1, 2, D)}))
    with pytest.raises(ValueError, match=r"layout: layer 1 .*v_first"):
        attnzoo.create_model("mha,rwkv7", vocab_size=16, dim=D, depth=2, num_heads=H)


REFUSED: list[tuple[str, dict[str, Any], str, object]] = [
    ("deltanet", {"key_norm": "none"}, "key_norm", "none"),
    ("deltanet", {"qk_activation": "gelu"}, "qk_activation", "gelu"),
    ("deltanet", {"conv_kernel": 0}, "conv_kernel", 0),
    ("deltanet", {"num_kv_heads": 3}, "num_kv_heads", 3),
    ("retnet", {"expand_v": 0.3}, "expand_v", 0.3),
    ("retnet", {"head_dim": 5}, "head_dim", 5),
    ("retnet", {"window": 4}, "window", "4"),
    ("gla", {"expand_k": 0.1}, "expand_k", 0.1),
    ("gla", {"expand_k": 0.3125}, "expand_k", 0.3125),
    ("gla", {"expand_v": 0.0}, "expand_v", 0.0),
    ("gla", {"gate_low_rank": 0}, "gate_low_rank", 0),
    ("gla", {"gate_logit_normalizer": 0.0}, "gate_logit_normalizer", 0.0),
    ("gla", {"clamp_min": 0.5}, "clamp_min", 0.5),
    ("kda", {"lower_bound": -6.0}, "lower_bound", -6.0),
    ("kda", {"lower_bound": 0.0, "safe_gate": True}, "lower_bound", 0.0),
    ("kda", {"num_v_heads": 6}, "num_v_heads", 6),
    ("kda", {"expand_v": 0.3}, "expand_v", 0.3),
    ("hgrn2", {"expand_ratio": 5}, "expand_ratio", 5),
    ("hgrn2", {"head_dim": 8}, "head_dim", 8),
    ("mamba2", {"head_dim": 24}, "head_dim", 24),
    ("mamba2", {"n_groups": 3}, "n_groups", 3),
    ("mamba2", {"n_groups": 0}, "n_groups", 0),
    ("mamba2", {"state_size": 0}, "state_size", 0),
    ("mamba2", {"expand": 0.01}, "expand", 0.01),
    ("mamba2", {"dt_limit": [0.5, 0.1]}, "dt_limit", 0.5),
    ("mamba2", {"num_kv_heads": 2}, "num_kv_heads", 2),
    ("rwkv7", {"head_dim": 6}, "head_dim", 6),
    ("rwkv7", {"pos": "rope"}, "pos", "rope"),
    ("rwkv7", {"gate_rank": 0}, "gate_rank", 0),
    ("rwkv7", {"gn_eps": 0.0}, "gn_eps", 0.0),
    ("rwkv7", {"num_kv_heads": 2}, "num_kv_heads", 2),
    ("log_linear", {"chunk_size": 48}, "chunk_size", 48),
    ("log_linear", {"base": "gla"}, "base", "gla"),
    ("log_linear", {"expand_v": 2.0}, "expand_v", 2.0),
    ("log_linear", {"base": "gated_deltanet", "state_size": 8}, "state_size", 8),
    ("log_linear", {"impl": "triton"}, "impl", "triton"),
    ("mamba2", {"add": ("kda",)}, "num_kv_heads|add", "kda"),
    ("mamba2", {"add": ("moh",), "router": "qnorm", "n_groups": 2}, "router", "qnorm"),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED)
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValueError) as caught:
        attnzoo.create(name, D, H, **options)
    message = str(caught.value)
    assert re.match(rf"({field}): ", message), message
    assert str(value) in message


TOPS: list[dict[str, Any]] = [
    {"add": ("moh",)},
    {"add": ("kha", "moh"), "kind": "linear"},
    {"output_gate": "headwise"},
    {"pos": "rope"},
    {"qkv_bias": True, "out_bias": True},
    {"num_kv_heads": 2},
    {"qk_norm": True},
]
IMPOSSIBLE = {
    "mamba2": ("num_kv_heads",),
    "log_linear": ("num_kv_heads",),
    "rwkv7": ("pos", "num_kv_heads", "qkv_bias"),
}


@pytest.mark.parametrize("top", TOPS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_compositions_decode_as_they_run(name: str, top: dict[str, Any]) -> None:
    small = {"state_size": 4} if name in ("mamba2", "log_linear") else {}
    if top.keys() & set(IMPOSSIBLE.get(name, ())):
        with pytest.raises(ValueError):
            made(name, **small, **top)
        return
    mixer, x = made(name, **small, **top).eval(), tokens()
    ids = torch.tensor([[1] * 5 + [2] * 7 + [0], [1] * 13])
    y, cache = mixer(x, Context(segment_ids=ids)), mixer.new_cache(2, T)
    parts = [slice(0, 4), slice(4, 5), slice(5, 12), slice(12, 13)]
    out = [mixer(x[:, p], Context(segment_ids=ids[:, p]), cache) for p in parts]
    same(torch.cat(out, dim=1), y)
    same(y[:1, 5:12], mixer(x[:1, 5:12]))


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("deltanet", {"key_norm": "sum", "qk_activation": "elu", "num_kv_heads": 2, "use_gate": True}),
    ("gla", {"num_kv_heads": 1, "clamp_min": -0.1, "chunk_size": 8}),
    ("kda", {"num_v_heads": 8, "use_short_conv": False, "allow_neg_eigval": True, "chunk_size": 8}),
    ("mamba2", {"state_size": 8, "n_groups": 4, "dt_limit": (0.01, 1.0), "qkv_bias": True}),
    ("log_linear", {"state_size": 8, "qkv_bias": True, "chunk_size": 4, "max_seq_len": 256}),
    ("log_linear", {"base": "gated_deltanet", "num_v_heads": 8, "use_gate": False, "max_seq_len": 256}),
    ("lightning_attention", {"layer_idx": 1, "num_layers": 3, "pos": "rope", "num_kv_heads": 2}),
]


@pytest.mark.parametrize("name, options", OPTIONS, ids=[f"{n}-{o}" for n, o in OPTIONS])
def test_every_property_holds_under_other_options(name: str, options: dict[str, Any]) -> None:
    check(Subject.of(name, **options))


def test_mamba2_starts_with_steps_between_a_thousandth_and_a_tenth() -> None:
    torch.manual_seed(0)
    step = torch.nn.functional.softplus(attnzoo.create("mamba2", 512, 64).gates.dt_bias)
    assert step.min() >= 1e-4 and step.max() <= 0.1001
    assert step.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.5)
