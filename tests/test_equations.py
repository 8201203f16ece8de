"""Each variant, at options that its golden file does not show, equals its equations written as loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
import oracles
from attnzoo.attention.base import Mixer
from attnzoo.context import Collector, Context
from golden import load_spec_weights, spec_options

D, H, T = 12, 4, 7


def draw(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {symbol: torch.randn(shape, dtype=torch.float64) * 0.7 for symbol, shape in shapes.items()}


def qkvo(q: int = D, k: int = D, v: int = D, o: int = D) -> dict[str, Tensor]:
    return draw(W_q=(D, q), W_k=(D, k), W_v=(D, v), W_o=(o, D))


def build(name: str, weights: dict[str, Tensor], **options: Any) -> Mixer:
    mixer = attnzoo.create(name, D, **spec_options(name, {"num_heads": H, **options})).double().eval()
    return load_spec_weights(mixer, weights)


def agree(mixer: Mixer, weights: dict[str, Tensor], heads: Callable[[Tensor], Tensor]) -> None:
    """Same outputs as ``heads(x)`` ``(T, H, d_v)`` through W_o, on two rows, and when decoded."""
    x = torch.randn(2, T, D, dtype=torch.float64)
    expected = torch.stack([oracles.out(heads(row), weights) for row in x])
    torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-9)
    cache = mixer.new_cache(2, T)
    parts = [mixer(part, cache=cache) for part in x.split([3, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name, kv_heads", [("mha", 4), ("mqa", 1), ("gqa", 2), ("gqa", 1), ("gqa", 4)])
def test_shared_heads(name: str, kv_heads: int) -> None:
    d = 6  # not D / H
    w = qkvo(H * d, kv_heads * d, kv_heads * d, H * d)
    w |= draw(b_q=(H * d,), b_k=(kv_heads * d,), b_v=(kv_heads * d,), b_o=(D,), gamma_q=(d,), gamma_k=(d,))
    options = {"head_dim": d, "kv_heads": kv_heads, "qk_norm": True, "rope_theta": 100.0}
    mixer = build(name, w, qkv_bias=True, out_bias=True, **options)
    agree(mixer, w, lambda x: oracles.host(x, w, H, kv_heads, theta=100.0))


@pytest.mark.parametrize("window, sinks", [(1, 0), (1, 1), (3, 2), (2, 4), (20, 3)])
def test_sliding_window(window: int, sinks: int) -> None:
    w = qkvo(16, 8, 8, 16)
    mixer = build("sliding_window", w, head_dim=4, window=window, n_sink=sinks, num_kv_heads=2)
    agree(mixer, w, lambda x: oracles.host(x, w, H, 2, window=window, sinks=sinks))


@pytest.mark.parametrize("q_rank", [0, 5])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("d_r", [0, 4])
def test_mla(q_rank: int, norm: bool, d_r: int) -> None:
    d_n, d_v, rank = 3, 5, 8
    width = H * (d_n + d_r)
    w = draw(W_dq=(D, q_rank), W_uq=(q_rank, width)) if q_rank else draw(W_q=(D, width))
    w |= draw(W_dkv=(D, rank + d_r), W_ukv=(rank, H * (d_n + d_v)), W_o=(H * d_v, D))
    if norm:
        w |= draw(gamma_kv=(rank,), **({"gamma_q": (q_rank,)} if q_rank else {}))
    mixer = build(
        "mla",
        w,
        kv_lora_rank=rank,
        q_lora_rank=q_rank,
        qk_nope_head_dim=d_n,
        qk_rope_head_dim=d_r,
        v_head_dim=d_v,
        latent_norm=norm,
        eps=1e-6,
        rope_mode="decoupled" if d_r else "none",
    )
    agree(mixer, w, lambda x: oracles.mla(x, w, H, d_n, d_r, norm))


@pytest.mark.parametrize(
    "kind, targets",
    [
        ("linear", "qkv"),
        ("linear", "k"),
        ("mlp", "v"),
        ("mlp", "q"),
        ("gate", "v"),
        ("linear", "vq"),
    ],
)
def test_kha(kind: str, targets: str) -> None:
    d = 4
    w = qkvo(16, 8, 8, 16) | draw(gamma_q=(d,), gamma_k=(d,))
    symbols = {"mlp": ["W_up", "W_gate", "W_down"], "gate": ["W_gate"]}
    w |= draw(**dict.fromkeys(symbols.get(kind, [f"T_{t.upper()}" for t in targets]), (d, d)))
    mixer = build("kha", w, head_dim=d, num_kv_heads=2, kind=kind, targets=list(targets), qk_norm=True)
    agree(mixer, w, lambda x: oracles.host(x, w, H, 2, knock=oracles.knocked(w, kind, targets)))


def test_kha_by_default() -> None:
    w = qkvo(16, 16, 16, 16) | draw(W_up=(4, 4), W_gate=(4, 4), W_down=(4, 4))
    knock = oracles.knocked(w, "mlp", "v")
    agree(build("kha", w, head_dim=4), w, lambda x: oracles.host(x, w, H, knock=knock))


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("sides", [("query", "key"), ("query",), ("key",), ()])
@pytest.mark.parametrize("stages", [("pre", "post"), ("pre",), ("post",)])
def test_dcmha(stages: tuple[str, ...], sides: tuple[str, ...], static: bool) -> None:
    if not sides and not static:
        return
    rank, d, n = 2, 4, len(stages) * len(sides)
    w = qkvo(16, 16, 16, 16) | draw(gamma_q=(d,), gamma_k=(d,))
    four = draw(W1=(D, 4, 3 * H * rank), Q=(4, 3 * H * rank, 2 * rank, H), W_d=(D, 4, H))
    w |= (four if n else {}) | (draw(**{f"W_b_{stage}": (H, H) for stage in stages}) if static else {})
    mixer = build(
        "dcmha",
        w,
        head_dim=d,
        rank=rank,
        hidden_mult=3,
        static_proj=static,
        qk_norm=True,
        query_wise="query" in sides,
        key_wise="key" in sides,
        pre_compose="pre" in stages,
        post_compose="post" in stages,
    )

    def heads(x: Tensor) -> Tensor:
        return oracles.host(x, w, H, compose=oracles.composer(x, w, H, rank, sides, stages))

    agree(mixer, w, heads)


@pytest.mark.parametrize("shared, active", [(0, 4), (0, 2), (1, 3), (2, 3), (3, 4), (4, 4)])
@pytest.mark.parametrize("form", ["code", "paper"])
def test_moh(form: str, shared: int, active: int) -> None:
    w = qkvo(16, 8, 8, 16)
    w |= draw(W_r=(D, H - shared)) if shared < H - 1 else {}  # one routed head has nothing to weigh
    w |= (draw(W_s=(D, shared)) if shared > 1 else {}) | (draw(W_b=(D, 2)) if 0 < shared < H else {})
    options = {"shared_heads": shared, "active_heads": active, "gate_form": form, "router": "linear"}
    mixer = build("moh", w, head_dim=4, kv_heads=2, **options)

    def heads(x: Tensor) -> Tensor:
        return oracles.moh_gate(x, w, H, shared, active - shared, form)[..., None] * oracles.host(x, w, H, 2)

    agree(mixer, w, heads)


@pytest.mark.parametrize("shared, active", [(0, 2), (1, 2), (2, 3)])
def test_moh_by_query_norm(shared: int, active: int) -> None:
    w = qkvo(16, 8, 8, 16)
    options = {"shared_heads": shared, "active_heads": active, "router": "qnorm"}
    mixer = build("moh", w, head_dim=4, num_kv_heads=2, **options)

    def heads(x: Tensor) -> Tensor:
        gate = oracles.qnorm_gate(oracles.split(x @ w["W_q"], H), shared, active - shared)
        return gate[..., None] * oracles.host(x, w, H, 2)

    agree(mixer, w, heads)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(mixer.train()(x[None]).square().sum(), x)
    (expected,) = torch.autograd.grad(oracles.out(heads(x), w).square().sum(), x)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_moh_balance_loss() -> None:
    w = qkvo() | draw(W_r=(D, 3), W_b=(D, 2))
    mixer = build("moh", w, shared_heads=1, active_heads=3, pos="none", aux_weight=0.3)
    x, collector = torch.randn(2, T, D, dtype=torch.float64), Collector()
    mixer(x, Context(collector=collector))
    pi = (x @ w["W_r"]).softmax(-1).flatten(0, 1)
    share = [sum(e in row.topk(2).indices.tolist() for row in pi) / len(pi) for e in range(3)]
    expected = 3 * sum(f * p for f, p in zip(share, pi.mean(0), strict=True))
    loss, weight = collector.losses["moh/balance"][0]
    torch.testing.assert_close(loss, expected)
    assert weight == 0.3
    torch.testing.assert_close(collector.total().double(), 0.3 * expected, rtol=1e-6, atol=0)


def test_moh_load_is_top_k_when_balanced() -> None:
    w = qkvo() | {"W_r": torch.zeros(D, 4).double()}
    mixer, collector = build("moh", w, shared_heads=0, active_heads=2, pos="none"), Collector()
    mixer(torch.randn(1, T, D).double(), Context(collector=collector))
    torch.testing.assert_close(collector.losses["moh/balance"][0][0], torch.tensor(2.0).double())


LEARNED = {"hedgehog": ("W_phi", "b_phi"), "t2r": ("W_phi",), "hadamard": ("W1", "b1", "W2", "b2")}


@pytest.mark.parametrize("rope", ["none", "numerator"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    "kind, normalize",
    [
        ("elu1", True),
        ("elu1", False),
        ("relu", False),
        ("identity", False),
        ("hedgehog", True),
        ("hedgehog", False),
        ("t2r", False),
        ("dpfp", True),
        ("dpfp", False),
        ("hadamard", False),
    ],
)
def test_linear(kind: str, normalize: bool, kv_heads: int, rope: str) -> None:
    d = 4
    w = qkvo(16, kv_heads * d, kv_heads * d, 16) | ({} if normalize else draw(gamma_o=(d,)))
    for symbol in LEARNED.get(kind, ()):
        w |= draw(**{f"{symbol}_{side}": (d, d) if symbol[0] == "W" else (d,) for side in "qk"})
    mixer = build(
        "linear",
        w,
        head_dim=d,
        num_kv_heads=kv_heads,
        feature_map=kind,
        normalize=normalize,
        rope=rope,
        nu=3,
        eps=1e-6 if normalize else 1e-5,
        chunk_size=4,
    )
    theta = 10000.0 if rope == "numerator" else None
    agree(mixer, w, lambda x: oracles.linear(x, w, H, kv_heads, kind, normalize, theta, nu=3))


@pytest.mark.parametrize("v_heads", [4, 8])
@pytest.mark.parametrize(
    "gate, conv, neg",
    [
        (True, 4, False),
        (False, 2, True),
        (True, 0, True),
        (False, 0, False),
    ],
)
def test_gated_deltanet(v_heads: int, gate: bool, conv: int, neg: bool) -> None:
    d, d_v = 4, 6
    w = qkvo(H * d, H * d, v_heads * d_v, v_heads * d_v)
    w |= draw(W_a=(D, v_heads), W_beta=(D, v_heads), A_log=(v_heads,), dt_bias=(v_heads,), gamma_o=(d_v,))
    w |= draw(W_g=(D, v_heads * d_v)) if gate else {}
    w |= draw(conv_q=(H * d, conv), conv_k=(H * d, conv), conv_v=(v_heads * d_v, conv)) if conv else {}
    mixer = build(
        "gated_deltanet",
        w,
        head_dim=d,
        expand_v=1.5,
        num_v_heads=v_heads,
        use_gate=gate,
        use_short_conv=conv > 0,
        conv_kernel=conv or 4,
        allow_neg_eigval=neg,
        norm_eps=1e-5,
        chunk_size=3,
    )
    agree(mixer, w, lambda x: oracles.gated_deltanet(x, w, H, v_heads, 2.0 if neg else 1.0))


@pytest.mark.parametrize("form", ["headwise", "elementwise"])
@pytest.mark.parametrize("name", ["gqa", "linear"])
def test_output_gate(name: str, form: str) -> None:
    kv, d = 2, 4
    w = qkvo(16, kv * d, kv * d, 16) | draw(W_gamma=(D, H if form == "headwise" else H * d))
    mixer = build(name, w, head_dim=d, num_kv_heads=kv, output_gate=form, pos="none")

    def heads(x: Tensor) -> Tensor:
        o = oracles.host(x, w, H, kv, theta=None) if name == "gqa" else oracles.linear(x, w, H, kv)
        return o * torch.sigmoid(x @ w["W_gamma"]).reshape(T, H, -1)

    agree(mixer, w, heads)
