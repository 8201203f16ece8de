"""The family ``recurrence`` against token-by-token oracles, under every option; and the scan by levels."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
import recurrences
from attnzoo.attention import timeline
from attnzoo.attention.base import Mixer
from attnzoo.attention.recurrence.levels import level_scan
from attnzoo.context import Context
from attnzoo.ops import scan
from golden import load_spec_weights

D, H, T = 16, 4, 11
HEADS = {"num_heads": H}


def shapes(name: str, o: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The weights of a variant by symbol."""
    G, d = o.get("num_kv_heads", H), D // H
    square = {f"W_{n}": (D, D) for n in ("q", "o")} | {f"W_{n}": (D, G * d) for n in "kv"}
    taps = {f"conv_{n}": (D if n == "q" else G * d, 4) for n in "qkv"}
    if name == "deltanet":
        return (
            square
            | ({} if o.get("use_short_conv") is False else taps)
            | ({} if o.get("use_beta") is False else {"W_beta": (D, H)})
            | ({"W_g": (D, D)} if o.get("use_gate") else {})
            | {"gamma_o": (d,)}
        )
    if name == "retnet":
        wide = int(d * o.get("expand_v", 2))
        own = {"W_v": (D, G * wide), "W_g": (D, H * wide), "W_o": (H * wide, D)}
        return square | own | ({"gamma_o": (wide,)} if o.get("norm_affine") else {})
    if name == "lightning_attention":
        packed = {"W_qkv": (D, 3 * D), "W_o": (D, D)} if o.pop("packed", False) else square
        return packed | {"W_g": (D, D), "gamma_o": (D,)}
    if name == "gla":
        K = D // 2
        own = {"W_q": (D, K), "W_k": (D, K * G // H), "W_v": (D, D * G // H), "W_g": (D, D), "W_o": (D, D)}
        own |= {"W_1": (D, 5), "W_2": (5, K * G // H), "b": (K * G // H,), "gamma_o": (d,)}
        conv = {"conv_q": (K, 4), "conv_k": (K * G // H, 4), "conv_v": (D * G // H, 4)}
        return own | (conv if o.get("use_short_conv") else {})
    if name == "kda":
        H_v = o.get("num_v_heads", H)
        own = square | {"W_v": (D, H_v * d), "W_o": (H_v * d, D), "W_beta": (D, H_v), "A_log": (H_v,)}
        own |= {"F_1": (D, d), "F_2": (d, H_v * d), "dt_bias": (H_v * d,), "gamma_o": (d,)}
        own |= {"G_1": (D, d), "G_2": (d, H_v * d)}
        own |= {} if o.get("gate_bias") is False else {"b": (H_v * d,)}
        return own | ({} if o.get("use_short_conv") is False else taps | {"conv_v": (H_v * d, 4)})
    if name == "hgrn2":
        own = {f"W_{n}": (D, D) for n in "qfio"} | {"gamma_o": (D,)}
        lower = o.get("layer_idx") and o.get("use_lower_bound", True)
        own |= {"Gamma": (o["num_layers"], D)} if lower else {}
        return own | (taps if o.get("use_short_conv") else {})
    if name == "rwkv7":
        ranks = {"w": o["decay_rank"], "a": o["a_rank"], "g": o["gate_rank"]}
        ranks |= {"v": o["v_rank"]} if o.get("layer_idx") else {}
        own = {f"W_{n}": (D, D) for n in "rkvo"} | {f"mu_{n}": (D,) for n in "rwkvag"}
        own |= {f"W_{n}1": (D, r) for n, r in ranks.items()} | {f"W_{n}2": (r, D) for n, r in ranks.items()}
        own |= dict.fromkeys(("w0", "a0", "k_k", "k_a", "gn_w", "gn_b", *(["v0"] * ("v" in ranks))), (D,))
        return own | {"r_k": (H, d)}
    levels = {"W_lambda": (D, H * 5), "Lambda": (H, 5)} if name == "log_linear" else {}
    if o.get("base") == "gated_deltanet":
        K, V = o["head_dim"], 2 * o["head_dim"]
        own = {"W_q": (D, H * K), "W_k": (D, H * K), "W_v": (D, H * V), "W_g": (D, H * V), "W_o": (H * V, D)}
        own |= {"conv_q": (H * K, 4), "conv_k": (H * K, 4), "conv_v": (H * V, 4), "gamma_o": (V,)}
        own |= {"W_a": (D, H), "W_beta": (D, H), "A_log": (H,), "dt_bias": (H,)}
        return own | levels
    inner, keys = int(D * o.get("expand", 2)), o["state_size"] * o.get("n_groups", 1)
    own = {"W_in": (D, 2 * inner + 2 * keys + H), "W_out": (inner, D), "gamma_o": (inner,), "D": (H,)}
    own |= {"A_log": (H,), "dt_bias": (H,), "conv_q": (keys, 4), "conv_k": (keys, 4), "conv_v": (inner, 4)}
    own |= {"conv_q_bias": (keys,), "conv_k_bias": (keys,), "conv_v_bias": (inner,)}
    if o.get("qkv_bias"):
        own |= {"b_in": (2 * inner + 2 * keys + H,)} | ({"b_lambda": (H * 5,)} if levels else {})
    return own | levels


def drawn(name: str, o: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {
        symbol: torch.randn(shape).double() / (shape[0] ** 0.5 if len(shape) > 1 else 1) + (len(shape) == 1)
        for symbol, shape in shapes(name, o).items()
    }


CASES: list[tuple[str, dict[str, Any]]] = [
    ("deltanet", {"use_short_conv": False}),
    ("deltanet", {"qk_activation": "relu", "use_gate": True}),
    ("deltanet", {"qk_activation": "identity", "allow_neg_eigval": True}),
    ("deltanet", {"qk_activation": "elu", "key_norm": "sum", "num_kv_heads": 2}),
    ("deltanet", {"use_beta": False, "num_kv_heads": 1}),
    ("deltanet", {"use_beta": False, "allow_neg_eigval": True, "use_short_conv": False}),
    ("retnet", {"norm_affine": True, "expand_v": 1.5}),
    ("retnet", {"num_kv_heads": 2, "gate_fn": "gelu"}),
    ("retnet", {"torchscale_norm": True, "norm_eps": 0.3}),
    ("retnet", {"torchscale_norm": True, "norm_eps": 0.3, "num_kv_heads": 2}),
    ("lightning_attention", {}),
    ("lightning_attention", {"layer_idx": 1, "num_layers": 4, "packed": True}),
    ("lightning_attention", {"layer_idx": 3, "num_layers": 4}),
    ("gla", {"gate_low_rank": 5, "num_kv_heads": 2, "gate_logit_normalizer": 2.0}),
    ("gla", {"gate_low_rank": 5, "use_short_conv": True, "clamp_min": -0.02}),
    ("kda", {}),
    ("kda", {"num_v_heads": 8, "allow_neg_eigval": True, "gate_bias": False}),
    ("kda", {"safe_gate": True, "lower_bound": -2.0, "use_short_conv": False}),
    ("hgrn2", {}),
    ("hgrn2", {"layer_idx": 1, "num_layers": 3, "use_short_conv": True}),
    ("hgrn2", {"layer_idx": 2, "num_layers": 3, "expand_ratio": 2}),
    ("hgrn2", {"layer_idx": 2, "num_layers": 3, "use_lower_bound": False}),
    ("mamba2", {"state_size": 6, "n_groups": 2, "dt_limit": (0.8, 1.6)}),
    ("mamba2", {"state_size": 3, "n_groups": 4, "expand": 1.0, "qkv_bias": True}),
    ("log_linear", {"state_size": 6, "n_groups": 2, "max_seq_len": 16, "qkv_bias": True}),
    ("log_linear", {"base": "gated_deltanet", "head_dim": 3, "max_seq_len": 11}),
]


@pytest.mark.parametrize("chunk_size", [4, 64])
@pytest.mark.parametrize("name, options", CASES, ids=[f"{n}-{o}" for n, o in CASES])
def test_equals_its_oracle(name: str, options: dict[str, Any], chunk_size: int) -> None:
    options = HEADS | options
    w = drawn(name, options)
    mixer = attnzoo.create(name, D, chunk_size=chunk_size, **options).double()
    load_spec_weights(mixer, w)
    x = torch.randn(T, D).double()
    want = getattr(recurrences, name)(x, w, options)
    torch.testing.assert_close(mixer(x[None])[0], want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layer", [0, 1])
def test_rwkv7_hands_on_the_values_of_its_first_layer(layer: int) -> None:
    options = HEADS | {"decay_rank": 3, "a_rank": 5, "v_rank": 4, "gate_rank": 6, "gn_eps": 1e-3}
    options |= {"layer_idx": layer, "num_layers": 2}
    w, x, first = drawn("rwkv7", options), torch.randn(T, D).double(), torch.randn(T, D).double()
    mixer = load_spec_weights(attnzoo.create("rwkv7", D, chunk_size=4, **options).double(), w)
    ctx = Context(shared={"v_first": first[None]} if layer else {})
    want, values = recurrences.rwkv7(x, w, options, first if layer else None)
    torch.testing.assert_close(mixer(x[None], ctx)[0], want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ctx.shared["v_first"][0], first if layer else values, rtol=1e-9, atol=1e-10)


def test_retnet_starts_as_the_released_code_if_asked() -> None:
    """xavier_uniform, gain 2^(-5/2) for each of W_q, W_k, W_v, W_g on its own, 1/2 for W_o."""
    torch.manual_seed(0)
    d, mixer = 64, attnzoo.create("retnet", 64, 4, xavier_init=True, expand_v=2)
    q, k, v = mixer.project.qkv_proj.weight.split([d, d, 2 * d])
    gate = next(stage for stage in mixer.combine if hasattr(stage, "gate")).gate.weight
    matrices = [(q, 2**-2.5), (k, 2**-2.5), (v, 2**-2.5), (gate, 2**-2.5), (mixer.out.out_proj.weight, 0.5)]
    for weight, gain in matrices:
        bound = gain * (6 / sum(weight.shape)) ** 0.5
        assert weight.abs().max() <= bound and weight.abs().max() > 0.99 * bound
    assert mixer.project.qkv_proj.weight.no_reinit
    assert not attnzoo.create("retnet", 64, 4).project.qkv_proj.weight.detach().std() < 0.015


def test_retnet_rescalings_cancel_behind_the_head_norm() -> None:
    torch.manual_seed(0)
    plain, scaled = (
        attnzoo.create("retnet", D, H, norm_eps=1e-24, torchscale_norm=asked).double()
        for asked in (False, True)
    )
    with torch.no_grad():
        for theirs, ours in zip(plain.parameters(), scaled.parameters(), strict=True):
            ours.copy_(theirs)
    x = torch.randn(2, 40, D).double()
    torch.testing.assert_close(scaled(x), plain(x), rtol=1e-9, atol=1e-12)


def scan_levels(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, lam: Tensor, size: int
) -> Tensor:
    line = timeline.read(Context(), *q.shape[:2], q.device)
    return level_scan(q, k, v, g, beta, lam, line, size, None)[0]


def operands(length: int, delta: bool) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, length, 2, 5).double()
    k, v = torch.nn.functional.normalize(k, dim=-1), torch.randn(1, length, 2, 3).double()
    g, beta = -torch.rand(1, length, 2).double(), torch.rand(1, length, 2).double()
    return q, k, v, g, beta if delta else None


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_log_linear_op_equals_the_released_one(size: int) -> None:
    file = torch.load(Path(__file__).parents[1] / "golden" / "log_linear.op.pt", weights_only=True)
    given = {name: z.clone().requires_grad_() for name, z in file["inputs"].items()}
    q, k, v, g, lam = (given[n] for n in ("q", "k", "v", "g", "level_weights"))
    o = scan_levels(q, k, v, g, None, lam, size)
    torch.testing.assert_close(o, file["outputs"]["o"], rtol=1e-9, atol=1e-10)
    o.backward(file["grads"]["do"])
    for name, z in given.items():
        torch.testing.assert_close(z.grad, file["grads"][f"d{name}"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("size", [1, 2, 8, 32])
def test_equal_level_weights_are_the_base(size: int, delta: bool) -> None:
    q, k, v, g, beta = operands(37, delta)
    want, _ = scan(q, k, v, g, beta, scale=1.0, form="recurrent", impl="reference")
    got = scan_levels(q, k, v, g, beta, torch.ones(1, 37, 2, 7).double(), size)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("delta", [False, True])
def test_without_higher_levels_the_past_is_an_aligned_window(delta: bool) -> None:
    q, k, v, g, beta = operands(22, delta)
    lam = torch.ones(1, 22, 2, 6).double()
    lam[..., 3:] = 0
    got = scan_levels(q, k, v, g, beta, lam, 8)
    for start in range(0, 22, 4):
        here = slice(start, min(start + 4, 22))
        parts = [z if z is None else z[:, here] for z in (q, k, v, g, beta)]
        want, _ = scan(*parts, scale=1.0, form="recurrent", impl="reference")
        torch.testing.assert_close(got[:, here], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("decay", [0.0, -50.0, -1e4, -float("inf")])
def test_extreme_decays_of_levels_stay_finite(decay: float, delta: bool) -> None:
    q, k, v, g, beta = operands(19, delta)
    g = torch.where(torch.arange(19)[None, :, None] % 3 == 1, decay, g).requires_grad_()
    for dtype in (torch.float32, torch.float64):
        lam = torch.rand(1, 19, 2, 6).to(dtype)
        parts = [z if z is None else z.to(dtype) for z in (q, k, v, g, beta)]
        o = scan_levels(*parts, lam, 4)
        heads = [recurrences.levelled(*(z[0, :, h].detach().double() for z in (*parts[:4], lam)),
                 None if beta is None else beta[0, :, h]) for h in range(2)]  # fmt: skip
        tight = 1e-10 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(o[0].double(), torch.stack(heads, 1), rtol=tight, atol=tight)
        (grad,) = torch.autograd.grad(o.sum(), g)
        assert grad.isfinite().all()


def long_mixer(base: str) -> Mixer:
    torch.manual_seed(0)
    options = {"state_size": 4} if base == "mamba2" else {}
    mixer = attnzoo.create("log_linear", D, H, base=base, chunk_size=8, max_seq_len=128, **options).double()
    with torch.no_grad():
        for param in mixer.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return mixer.eval()


@pytest.mark.parametrize("base", ["mamba2", "gated_deltanet"])
def test_log_linear_levels_count_from_the_start_of_each_document(base: str) -> None:
    """XOR of positions in the row instead would give packed documents other levels; no state leaks over."""
    mixer, x = long_mixer(base), torch.randn(2, 90, D).double()
    ids = torch.zeros(2, 90, dtype=torch.long)
    for b, cuts in enumerate(((3, 20, 21, 61, 90), (0, 33, 50, 70, 87))):
        for i, (start, stop) in enumerate(pairwise(cuts)):
            ids[b, start:stop] = i + 1
    with torch.no_grad():
        packed = mixer(x, Context(segment_ids=ids))
        for b in range(2):
            for i in ids[b].unique()[1:] if (ids[b] == 0).any() else ids[b].unique():
                here = ids[b] == i
                alone = mixer(x[b : b + 1, here])[0]
                torch.testing.assert_close(packed[b, here], alone, rtol=1e-9, atol=1e-10)
        for pieces in ((1, 30, 2, 57), (5, 1, 1, 1, 82), (40, 50)):
            cache, outs, start = mixer.new_cache(2, 90), [], 0
            for n in pieces:
                part = slice(start, start + n)
                outs.append(mixer(x[:, part], Context(segment_ids=ids[:, part]), cache))
                start += n
            torch.testing.assert_close(torch.cat(outs, 1), packed, rtol=1e-9, atol=1e-10)


def test_log_linear_keeps_one_state_per_set_bit_of_the_length() -> None:
    mixer = long_mixer("mamba2")
    cache = mixer.new_cache(1, 128)
    with torch.no_grad():
        for t in range(45):
            mixer(torch.randn(1, 1, D).double(), cache=cache)
            held = cache.slots["levels"].abs().amax((0, 2, 3, 4)) > 0
            assert held.tolist() == [True] + [bool(t >> bit & 1) for bit in range(7)]


def test_a_document_longer_than_the_levels_is_refused() -> None:
    mixer = attnzoo.create("log_linear", D, H, max_seq_len=8)
    with pytest.raises(ValueError, match=r"max_seq_len: .* 9 tokens, .*room for 8"):
        mixer(torch.randn(1, 9, D))
    ids = torch.tensor([[1] * 8 + [2] * 8])
    assert mixer(torch.randn(1, 16, D), Context(segment_ids=ids)).isfinite().all()
    cache = mixer.new_cache(1, 32)
    mixer(torch.randn(1, 8, D), cache=cache)
    with pytest.raises(ValueError, match=r"max_seq_len: .* 9 tokens, .*room for 8"):
        mixer(torch.randn(1, 1, D), cache=cache)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mamba2_scores_are_billed_once_per_group(groups: int) -> None:
    """Per head they would be 2 C N H; the reference repeats them, which only the executed FLOPs show."""
    N, P, C, length = 6, 8, 8, 32
    mixers = [
        attnzoo.create("mamba2", D, H, state_size=N, n_groups=groups, chunk_size=C),
        attnzoo.create("mamba2", D, H, state_size=N, n_groups=H, chunk_size=C),
    ]
    bills = [mixer.cost(length).split["mixing"] * length for mixer in mixers]
    pairs = length // C * C * (C + 1) // 2
    assert bills[0] == 2 * pairs * (groups * N + H * P) + 4 * length * N * H * P
    assert bills[1] - bills[0] == (H - groups) * 2 * pairs * N
    costs = [mixer.cost(length) for mixer in mixers]
    run = [c.executed_flops - (c.forward_flops - c.split["mixing"]) for c in costs]
    assert run[0] == run[1]


@pytest.mark.parametrize(
    "name, more", [("gated_deltanet", {}), ("log_linear", {"base": "gated_deltanet", "max_seq_len": 32})]
)
def test_value_heads_that_share_a_key_share_its_scores(name: str, more: dict[str, Any]) -> None:
    C, length, d = 8, 32, 3
    options = {"head_dim": d, "expand_v": 1, "chunk_size": C, **more}
    shared = attnzoo.create(name, D, 2, num_v_heads=4, **options).cost(length).split["mixing"]
    own = attnzoo.create(name, D, 4, **options).cost(length).split["mixing"]
    assert (own - shared) * length == 2 * 2 * (length // C) * C * C * d
