"""based and fast_factorizable: sums by hand, identities, and what they refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.ops.taylor import taylor, taylor_flops
from zoo.kernelised import (
    GOLDEN,
    driven,
    heads_of,
    make,
    out_of,
    prefix_rows,
    run,
    same,
    tokens,
    turned,
    without,
)


def mean_of(weights: Tensor, v: Tensor) -> Tensor:
    return prefix_rows(weights, v) / prefix_rows(weights, torch.ones_like(v[..., :1]))


POLYNOMIALS = [
    ("based", {"feature_dim": 5}),
    ("based", {"feature_dim": 2, "chunk_size": 4, "num_kv_heads": 2}),
    ("based", {"feature_dim": 2, "chunk_size": 3, "pos": "rope", "head_dim": 6}),
    ("fast_factorizable", {}),
    ("fast_factorizable", {"norm": "unit", "chunk_size": 2, "head_dim": 2}),
    ("fast_factorizable", {"norm": "unit", "order": 1, "chunk_size": 2, "num_kv_heads": 1}),
    ("fast_factorizable", {"symmetric": False, "chunk_size": 2, "head_dim": 2}),
    ("fast_factorizable", {"mode": "quadratic", "num_kv_heads": 2}),
    ("fast_factorizable", {"mode": "quadratic", "norm": "unit", "order": 1, "pos": "rope"}),
]


@pytest.mark.parametrize("name, options", POLYNOMIALS, ids=str)
def test_polynomial_weights_by_hand(name: str, options: dict[str, Any]) -> None:
    mixer, x = make(name, **options), tokens()
    q, k, v = heads_of(mixer, x)
    scale = q.shape[2] ** -0.5
    if options.get("norm") == "unit":
        scale, (q, k) = 1.0, (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    elif name != "based":
        centred = (z - z.mean(-1, keepdim=True) for z in (q, k))
        q, k = (z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt() for z in centred)
    if options.get("pos") == "rope":
        q, k = turned(q), turned(k)
    s = scale * q @ k.mT
    weights = 1 + s + (s**2 / 2 if options.get("order", 2) == 2 else 0)
    assert (weights >= (0.5 if options.get("order", 2) == 2 else 0)).all()
    same(mixer(x[None])[0], out_of(mixer, mean_of(weights, v)))


def test_fast_factorizable_golden() -> None:
    file = torch.load(GOLDEN / "fast_factorizable.op.pt", weights_only=True)
    first = file["extra"]["inputs_p1"], file["extra"]["o_p1"], 1
    for given, expected, order in ((file["inputs"], file["outputs"]["o"], 2), first):
        q, k, v = (given[name] for name in ("q_hat", "k_hat", "v"))
        for options in ({}, {"mode": "quadratic"}, {"symmetric": False}, {"chunk_size": 2}):
            mixer, x = driven("fast_factorizable", q, k, v, order=order, norm="unit", **options)
            same(run(without(mixer, "refine"), x, expected), expected, 1e-9)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("packed", [True, False])
def test_taylor_forms_agree_on_packed_documents(order: int, packed: bool) -> None:
    q, k = tokens(2, 2, 40, 3, 4)
    v, ids = tokens(2, 40, 3, 5), torch.tensor([[0] * 9 + [1] + [2] * 30, [0] * 40])
    options = {"order": order, "packed": packed, "segments": ids, "scale": 0.2}
    assert taylor_flops(40, 3, 4, 6, order, 64, packed).quadratic
    whole, none = taylor(q, k, v, **options)
    assert none is None
    for chunk in (64, 7, 1):
        o, state = taylor(q, k, v, chunk_size=chunk, output_final_state=True, **options)
        same(o, whole)
        more, _ = taylor(
            q[:, :3], k[:, :3], v[:, :3], order=order, packed=packed, scale=0.2, initial_state=state
        )
        both = (torch.cat([z, z[:, :3]], dim=1) for z in (q, k, v))
        again = torch.cat([ids, ids[:, -1:].expand(-1, 3)], dim=1)
        same(more, taylor(*both, **options | {"segments": again})[0][:, 40:])


def test_based_is_fast_factorizable_without_its_norm() -> None:
    q, k, v = tokens(3, 1, 14, 2, 4)
    based, x = driven("based", q, k, v, feature_dim=4)
    fast, _ = driven("fast_factorizable", q, k, v)
    same(based(x), without(fast, "refine")(x))
    assert based.new_cache(1, 99).slots["S"].shape == (1, 2, 15, 5)


def test_small_scores_are_those_of_softmax() -> None:
    q, k, v = tokens(3, 1, 14, 2, 4)
    fast, x = driven("fast_factorizable", 0.02 * q, 0.02 * k, v)
    soft, _ = driven("mha", 0.02 * q, 0.02 * k, v, pos="none")
    same(without(fast, "refine")(x), soft(x), 1e-7)


def test_fast_factorizable_keeps_keys_narrow_at_any_dim() -> None:
    mixer = attnzoo.create("fast_factorizable", 256, 2)
    assert mixer.project.widths == (64, 64, 128)
    assert attnzoo.create("fast_factorizable", 256, 2, mode="quadratic").project.widths == (128, 128, 128)


REFUSED = [
    ("based", {"feature_dim": 33}, "feature_dim", 33),
    ("based", {"feature_dim": 0}, "feature_dim", 0),
    ("based", {"feature_dim": 5, "pos": "rope"}, "feature_dim", 5),
    ("based", {"impl": "triton"}, "impl", "triton"),
    ("based", {"chunk_size": 0}, "chunk_size", 0),
    ("gated_deltanet", {"add": "based"}, "add", "gated_deltanet"),
    ("fast_factorizable", {"order": 1}, "norm", "order=1"),
    ("fast_factorizable", {"order": 3}, "order", 3),
    ("fast_factorizable", {"head_dim": 80}, "head_dim", 80),
    ("fast_factorizable", {"window": 4}, "window", 4),
    ("fast_factorizable", {"mode": "quadratic", "chunk_size": 8}, "chunk_size", 8),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=str)
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValueError) as caught:
        attnzoo.create(name, 32, 4, **options)
    assert re.match(rf"{field}: .{{15,}}", str(caught.value)) and str(value) in str(caught.value)
