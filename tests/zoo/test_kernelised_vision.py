"""mala and rala, causal forms of methods for images: sums by hand, identities, and what they refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from zoo.kernelised import T, driven, elu1, gated, heads_of, local, make, run, same, tokens, turned

MAGNITUDES = [{"pos": "none"}, {"mala_norm": "sum", "num_kv_heads": 2}, {"lepe_kernel": 2, "out_gate": False}]


@pytest.mark.parametrize("options", MAGNITUDES, ids=str)
def test_mala_by_loops(options: dict[str, Any]) -> None:
    mixer, x = make("mala", **options), tokens()
    q, k, v = heads_of(mixer, x)
    q, k, o = elu1(q), elu1(k), torch.empty_like(v)
    rq, rk = (turned(q), turned(k)) if options.get("pos") != "none" else (q, k)
    for h in range(4):
        for t in range(T):
            s, n = 4**-0.5, t + 1
            z = q[h, t] @ k[h, :n].sum(0) * (1 if options.get("mala_norm") == "sum" else s / n)
            weights = rk[h, :n] @ rq[h, t] * (1 if options.get("mala_norm") == "sum" else s / n)
            o[h, t] = ((1 + 1 / (z + 1e-6)) * weights - z / n) @ v[h, :n]
    same(mixer(x[None])[0], gated(mixer, x, o + local(mixer, v)))


def mala_heads(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    mixer, x = driven("mala", q, k, v, pos="none", lepe_kernel=0, out_gate=False, **options)
    mixer.project.qkv_proj.bias.zero_()
    mixer.out.out_proj.bias.zero_()
    return run(mixer, x, v)


@pytest.mark.parametrize("norm", ["mean", "sum"])
def test_mala_weights_sum_to_one(norm: str) -> None:
    q, k = tokens(2, 1, 14, 2, 4)
    same(mala_heads(q, k, torch.ones_like(k), mala_norm=norm), torch.ones_like(k), 1e-5)


def test_mala_means_are_prefix_means_not_sequence_means() -> None:
    """Normalised linear attention plus the covariance of key features and values over the prefix."""
    q, k, v = tokens(3, 1, 14, 2, 4)
    o, fq, fk = mala_heads(q, k, v), elu1(q), elu1(k)
    for t in range(14):
        keys, values = fk[0, : t + 1], v[0, : t + 1]
        for h in range(2):
            a = keys[:, h] @ fq[0, t, h]
            centred = keys[:, h] - keys[:, h].mean(0)
            covariance = centred.T @ (values[:, h] - values[:, h].mean(0)) / (t + 1)
            same(o[0, t, h], a @ values[:, h] / a.sum() + 0.5 * fq[0, t, h] @ covariance, 1e-5)


RELEVANT = [{"pos": "none"}, {"num_kv_heads": 2, "lepe_kernel": 2}, {"out_gate": False, "chunk_size": 3}]


@pytest.mark.parametrize("mode", ["frozen", "prefix_exact"])
@pytest.mark.parametrize("options", RELEVANT, ids=str)
def test_rala_by_loops(mode: str, options: dict[str, Any]) -> None:
    mixer, x = make("rala", mode=mode, **options), tokens()
    q, k, v = heads_of(mixer, x)
    q, k, o = elu1(q), elu1(k), torch.empty_like(v)
    rq, rk = (turned(q), turned(k)) if options.get("pos") != "none" else (q, k)
    for h in range(4):
        bar = torch.stack([q[h, : t + 1].mean(0) for t in range(T)])
        for t in range(T):
            n = t + 1
            e = 0.5 * (k[h, :n] * (bar[:n] if mode == "frozen" else bar[t])).sum(1)
            a = (e - e.max()).exp()
            a = a if mode == "frozen" else n * a / a.sum()
            o[h, t] = (a * (rk[h, :n] @ rq[h, t])) @ v[h, :n] / (a * (k[h, :n] @ q[h, t])).sum().add(1e-6)
    same(mixer(x[None])[0], gated(mixer, x, o + local(mixer, v)))


def test_rala_mean_query_is_that_of_the_prefix() -> None:
    """A later query changes neither mode's weights of the tokens before it."""
    for mode in ("frozen", "prefix_exact"):
        mixer, x = make("rala", mode=mode), tokens(1, T, 16)
        other = x.clone()
        other[:, 8:] *= 30
        assert torch.equal(mixer(other)[:, :8], mixer(x)[:, :8])


@pytest.mark.parametrize("mode", ["frozen", "prefix_exact"])
def test_rala_of_equal_relevance_is_linear(mode: str) -> None:
    q, k, v = tokens(3, 1, 14, 2, 4)
    k = k[:, :1].expand_as(k)  # one key many times has one relevance under one mean query
    q = q[:, :1].expand_as(q)
    options = {"pos": "none", "head_dim": 4}
    mixer, x = driven("rala", q, k, v, mode=mode, lepe_kernel=0, out_gate=False, pos="none")
    plain = attnzoo.create("linear", x.shape[2], 2, **options).double().requires_grad_(False)
    plain.load_state_dict({n: z for n, z in mixer.state_dict().items() if "bias" not in n})
    mixer.project.qkv_proj.bias.zero_()
    mixer.out.out_proj.bias.zero_()
    same(mixer(x), plain(x), 1e-5)


def test_rala_stays_finite_where_exp_overflows() -> None:
    q, k, v = tokens(3, 1, 20, 2, 4)
    mixer, x = driven("rala", 60 * q.abs(), 60 * k.abs(), v, pos="none", out_gate=False)
    mixer = mixer.float()
    assert mixer(x.float()).isfinite().all()


REFUSED = [
    ("mala", {"lepe_kernel": -2}, "lepe_kernel", -2),
    ("mala", {"mala_norm": "max"}, "mala_norm", "max"),
    ("rala", {"mode": "bidirectional"}, "mode", "bidirectional"),
    ("rala", {"mode": "prefix_exact", "impl": "triton"}, "impl", "triton"),
    ("rala", {"chunk_size": 0}, "chunk_size", 0),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=str)
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValueError) as caught:
        attnzoo.create(name, 32, 4, **options)
    assert re.fullmatch(rf"{field}: .{{15,}}", str(caught.value)) and str(value) in str(caught.value)
