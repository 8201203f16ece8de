"""Shared and tensorised projections against their equations, token by token."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.attention.base import Mixer
from attnzoo.testing import PROPERTIES, Subject
from oracles import attend, causal, rotate
from test_refusals import named, run
from tiny import D, H, T, build, d, same, tokens

REFUSED = [
    ("mhe", {"num_kv_heads": 2}, "num_kv_heads", 2),
    ("mhe", {"add": ("gqa",)}, "num_kv_heads", 1),
    ("mhe", {"mhe_kind": "pow"}, "mhe_kind", "pow"),
    ("mhe", {"mhe_kind": "add", "pairwise_scale": True}, "pairwise_scale", "true"),
    ("mhe", {"head_dim": 3, "pos": "none", "pairwise_scale": True}, "pairwise_scale", 3),
    ("mhe", {"head_dim": 3}, "head_dim", 3),
    ("tensorllm", {"rank_model": 0}, "rank_model", 0),
    ("tensorllm", {"rank_model": D + 1}, "rank_model", D + 1),
    ("tensorllm", {"rank_head": d + 1}, "rank_head", d + 1),
    ("tensorllm", {"rank_qkvo": 5}, "rank_qkvo", 5),
    ("tensorllm", {"num_kv_heads": 2}, "num_kv_heads", 2),
    ("tensorllm", {"add": ("gqa",)}, "add", (1, 4)),
    ("tensorllm", {"qkv_bias": True}, "qkv_bias", "True"),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=named(REFUSED))
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^({field}): .{{15,}}") as caught:
        attnzoo.create(name, D, H, **options)
    assert str(value) in str(caught.value)


# mhe

KINDS = [("add", False), ("mul", False), ("mul", True)]


def headed(kind: str, pairwise: bool, pos: str, **options: Any) -> Mixer:
    mixer = build("mhe", mhe_kind=kind, pairwise_scale=pairwise, pos=pos, **options)
    for e in (mixer.project.e_q, mixer.project.e_k, mixer.project.e_v):
        e.normal_()
    return mixer


@pytest.mark.parametrize("pos", ["rope", "none"])
@pytest.mark.parametrize("kind, pairwise", KINDS)
def test_mhe_heads_add_or_multiply_their_vectors(kind: str, pairwise: bool, pos: str) -> None:
    mixer, x = headed(kind, pairwise, pos), tokens()
    q0, k0, v0 = mixer.project.qkv_proj.weight.split(d)
    vectors = [
        torch.cat([e, e], 1) if e.shape[1] < d else e
        for e in (getattr(mixer.project, f"e_{n}") for n in "qkv")
    ]
    for row, y in zip(x, mixer(x), strict=True):
        heads = []
        for shared, e in zip((q0, k0, v0), vectors, strict=True):
            z = row @ shared.T
            heads.append([z + e[h] if kind == "add" else z * (1 + e[h]) for h in range(H)])
        theta = 10000.0 if pos == "rope" else None
        q, k = ([rotate(z, theta) for z in zs] for zs in heads[:2])
        same(y, attend(q, k, heads[2], causal(T)).flatten(1) @ mixer.out.out_proj.weight.T)
    same(run(mixer, x, [4, 1, 3, 1]), mixer(x))


@pytest.mark.parametrize("pos", ["rope", "none"])
@pytest.mark.parametrize("kind, pairwise", KINDS)
def test_mhe_folded_equals_materialised(kind: str, pairwise: bool, pos: str) -> None:
    mixer, x = headed(kind, pairwise, pos), tokens()
    assert mixer.project.folds == (pos == "none" or pairwise or kind == "add")
    folded = mixer(x)
    mixer.project.fold(pos == "rope", whole=False)
    assert not mixer.project.absorbs(T, T)
    same(mixer(x), folded)


@pytest.mark.parametrize("kind, pairwise", KINDS)
def test_mhe_caches_one_head_rotated_where_it_folds(kind: str, pairwise: bool) -> None:
    mixer, x = headed(kind, pairwise, "rope"), tokens(1, T, D)
    cache = mixer.new_cache(1, T)
    mixer(x, cache=cache)
    assert {name: tuple(z.shape) for name, z in cache.slots.items()} == {
        "k0": (1, 1, T, d),
        "v0": (1, 1, T, d),
    }
    k0 = x[0] @ mixer.project.qkv_proj.weight[d : 2 * d].T
    same(cache.slots["k0"][0, 0], rotate(k0, 10000.0) if kind == "add" or pairwise else k0)


@pytest.mark.parametrize("kind", ["add", "mul"])
def test_mhe_without_vectors_is_mqa_with_one_query_matrix(kind: str) -> None:
    mixer, mqa, x = build("mhe", mhe_kind=kind), build("mqa"), tokens()
    for name in ("e_q", "e_k", "e_v"):
        getattr(mixer.project, name).zero_()
    q, k, v = mixer.project.qkv_proj.weight.split(d)
    mqa.project.qkv_proj.weight.copy_(torch.cat([q] * H + [k, v]))
    mqa.out.load_state_dict(mixer.out.state_dict())
    same(mixer(x), mqa(x))


def test_mhe_key_vectors_cancel_without_positions() -> None:
    assert not attnzoo.card("mhe").no_grad, "at its defaults every parameter learns"
    mixer, x = headed("add", False, "none"), tokens()
    before = mixer(x)
    mixer.project.e_k.normal_()
    assert torch.equal(mixer(x), before)
    subject = Subject.of("mhe", mhe_kind="add", pos="none")
    card = replace(subject.card, no_grad={"project.e_k": "cancels"})
    PROPERTIES["gradients"](replace(subject, card=card))


def test_mhe_heads_exist_before_a_norm_of_them() -> None:
    mixer, x = headed("mul", True, "rope", qk_norm=True), tokens()
    assert not mixer.project.folds and not mixer.project.turned
    same(run(mixer, x, [5, 1, 1, 2]), mixer(x))


# tensorllm


def whole(mixer: Mixer) -> list[Tensor]:
    """W of q, k, v and o, each ``(H, D, d)``."""
    f = mixer.project
    core = f.core.permute(2, 1, 3, 0)  # H, R1, R2, R3
    return [torch.stack([f.U1 @ (core[h] @ f.U3[c]) @ f.U2.T for h in range(H)]) for c in range(4)]


@pytest.mark.parametrize("pos", ["rope", "none"])
@pytest.mark.parametrize("ranks", [(16, 4, 4), (7, 4, 2), (9, 2, 3), (1, 1, 1)])
def test_tensorllm_is_mha_with_the_matrices_multiplied_out(ranks: tuple[int, ...], pos: str) -> None:
    options = dict(zip(("rank_model", "rank_head", "rank_qkvo"), ranks, strict=True))
    mixer, mha, x = build("tensorllm", pos=pos, **options), build("mha", pos=pos), tokens()
    mixer.project.core.mul_(30)
    q, k, v, o = whole(mixer)
    mha.project.qkv_proj.weight.copy_(torch.cat([z.mT.flatten(0, 1) for z in (q, k, v)]))
    mha.out.out_proj.weight.copy_(o.permute(1, 0, 2).flatten(1))
    same(mixer(x), mha(x))
    same(run(mixer, x, [1, 4, 1, 3]), mha(x))
    width = ranks[1] if ranks[1] < d else d
    assert {tuple(z.shape) for z in mixer.new_cache(1, T).slots.values()} == {(1, H, T, width)}


def test_tensorllm_holds_any_mha() -> None:
    mixer, mha, x = build("tensorllm", rank_model=D, rank_head=d), build("mha"), tokens()
    f, weight = mixer.project, mha.project.qkv_proj.weight
    for factor in (f.U1, f.U2, f.U3):
        factor.copy_(torch.eye(len(factor)))
    q, k, v = weight.unflatten(0, (3, H, d)).permute(0, 3, 1, 2)
    f.core.copy_(torch.stack([q, k, v, mha.out.out_proj.weight.unflatten(1, (H, d))]))
    same(mixer(x), mha(x))


def test_tensorllm_starts_at_the_scale_of_mha() -> None:
    mixer = attnzoo.create("tensorllm", 256, 8, rank_qkvo=3, num_layers=8)
    core = mixer.project.core.permute(2, 1, 3, 0)
    for c, std in enumerate((0.02, 0.02, 0.02, 0.02 / math.sqrt(16))):
        matrices = mixer.project.U1 @ (core @ mixer.project.U3[c]) @ mixer.project.U2.T
        assert float(matrices.detach().std()) == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("name", ["mhe", "tensorllm"])
@pytest.mark.parametrize("prop", ["decode", "document_decode", "causal", "gradients", "flops"])
def test_heads_are_routed_by_their_whole_queries(prop: str, name: str) -> None:
    PROPERTIES[prop](Subject.of(name, add=("moh",), router="qnorm"))
