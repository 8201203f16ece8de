"""linear_icl, pavlovian and flatten against sums by hand, their identities, and what they refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnzoo
from zoo.kernelised import (
    GOLDEN,
    T,
    driven,
    heads_of,
    local,
    make,
    out_of,
    prefix_rows,
    run,
    same,
    tokens,
    turned,
    without,
)


@pytest.mark.parametrize("norm, key", [("mean", "o"), ("none", "o_none")])
def test_linear_icl_golden(norm: str, key: str) -> None:
    file = torch.load(GOLDEN / "linear_icl.op.pt", weights_only=True)
    mixer, x = driven("linear_icl", **file["inputs"], icl_norm=norm)
    same(run(mixer, x, file["outputs"][key]), file["outputs"][key], 1e-9)


def test_linear_icl_is_one_step_of_gradient_descent() -> None:
    n, p, eta = 11, 5, 0.3
    prompt = tokens(n + 1, p + 1)
    prompt[n, p] = 0  # the query's label
    step = eta / n * (prompt[:n, p, None] * prompt[:n, :p]).sum(0) @ prompt[n, :p]
    for options, factor in (({"icl_norm": "const", "icl_count": n}, 1.0), ({}, n / (n + 1))):
        mixer = attnzoo.create("linear_icl", p + 1, 1, **options).double().requires_grad_(False)
        inputs, label = torch.eye(p + 1).double(), torch.zeros(p + 1, p + 1).double()
        inputs[p, p], label[p, p] = 0, 1
        mixer.project.qkv_proj.weight.copy_(torch.cat([inputs, inputs, eta * label]))
        mixer.out.out_proj.weight.copy_(torch.eye(p + 1))
        same(mixer(prompt[None])[0, n, p], factor * step)


def test_linear_icl_is_linear_in_q_and_in_v() -> None:
    q, k, v, w = tokens(4, 1, 14, 2, 4)
    heads = lambda *given: run(*driven("linear_icl", *given), given[0])  # noqa: E731
    same(heads(2 * q, k, v), 2 * heads(q, k, v))
    same(heads(q, k, v + w), heads(q, k, v) + heads(q, k, w))


@pytest.mark.parametrize("rule", ["hebb", "trace", "rescorla_wagner"])
def test_pavlovian_golden(rule: str) -> None:
    file = torch.load(GOLDEN / "pavlovian.op.pt", weights_only=True)
    given, outputs = dict(file["inputs"]), file["outputs"]
    eta, lam = given.pop("eta"), given.pop("lam")
    mixer, x = driven("pavlovian", **given, rule=rule)
    mixer.gates.a.copy_(eta.logit())
    if rule != "hebb":
        mixer.gates.l.copy_(lam.logit())
    same(run(without(mixer, "combine"), x, outputs[f"o_{rule}"]), outputs[f"o_{rule}"], 1e-9)
    if rule == "rescorla_wagner":
        cache = mixer.new_cache(*x.shape[:2])
        mixer(x, cache=cache)
        same(cache.slots["S"], outputs["S_rescorla_wagner"], 1e-9)


def conditioned(rule: str, keys: Tensor, v: Tensor, query: Tensor, **more: Any) -> Tensor:
    """What a query finds after the pairs were stored with eta = 1: ``(d,)``."""
    d = keys.shape[1]
    q = torch.cat([torch.zeros_like(keys), query[None]])
    k, v = (torch.cat([z, torch.zeros(1, d).double()]) for z in (keys, v))
    options = {"eta": 1.0, "lam": 1.0, "learn_eta": False, "learn_lambda": False} | more
    mixer, x = driven("pavlovian", *(z[None, :, None] for z in (q, k, v)), rule=rule, **options)
    return without(mixer, "combine")(x)[0, -1, :d]


@pytest.mark.parametrize("rule", ["hebb", "trace", "rescorla_wagner"])
def test_pavlovian_retrieves_what_orthonormal_keys_stored(rule: str) -> None:
    keys, v = torch.linalg.qr(tokens(6, 6)).Q, tokens(6, 6)
    for j in range(6):
        same(conditioned(rule, keys, v, keys[j]), v[j], 1e-5)  # up to the eps of unit length


def test_pavlovian_overwrites_or_sums_a_repeated_key() -> None:
    key, v = tokens(1, 6).expand(3, -1), tokens(3, 6)
    same(conditioned("rescorla_wagner", key, v, key[0]), v[2], 1e-5)
    same(conditioned("hebb", key, v, key[0]), v.sum(0), 1e-5)
    traces = 0.5 * (0.125 * v[0] + 0.25 * v[1] + 0.5 * v[2])  # the query's step decays them once more
    same(conditioned("trace", key, v, key[0], eta=0.5, lam=0.5), traces, 1e-5)


def focus(z: Tensor, s: Tensor, power: float, per_head: bool) -> Tensor:
    """``(H, T, d)`` by tokens."""
    r = (z.relu() + 1e-6) / F.softplus(s)[:, None]
    out = torch.empty_like(r)
    for t in range(r.shape[1]):
        for h in [[i] for i in range(len(r))] if per_head else [list(range(len(r)))]:
            out[h, t] = r[h, t].norm() * r[h, t] ** power / (r[h, t] ** power).norm()
    return out


FLATTENED = [
    {"pos": "none"},
    {"focusing_factor": 2.5, "norm_scope": "head", "kernel_size": 4, "num_kv_heads": 2},
    {"learned_pos": True, "pos": "none", "max_seq_len": T, "num_kv_heads": 1, "norm_scope": "head"},
]


@pytest.mark.parametrize("options", FLATTENED, ids=str)
def test_flatten_by_loops(options: dict[str, Any]) -> None:
    mixer, x = make("flatten", **options), tokens()
    q, k, v = heads_of(mixer, x)
    stages = {type(stage).__name__: stage for stage in mixer.refine}
    if "KeyTable" in stages:
        k = k + stages["KeyTable"].table.transpose(0, 1)
    s = stages["Focus"].s.repeat_interleave(4 // len(stages["Focus"].s), dim=0)
    power, per_head = options.get("focusing_factor", 3), options.get("norm_scope") == "head"
    q, k = (focus(z, s, power, per_head) for z in (q, k))
    rotated = (turned(q), turned(k)) if options.get("pos") != "none" else (q, k)
    total = prefix_rows(q @ k.mT, torch.ones_like(v[..., :1])) + 1e-6
    o = prefix_rows(rotated[0] @ rotated[1].mT, v) / total + local(mixer, v)
    same(mixer(x[None])[0], out_of(mixer, o))


def test_flatten_keeps_norms_and_scales() -> None:
    stage = make("flatten", pos="none").refine[0]
    stage.s.zero_()
    q = tokens(1, 4, T, 4).abs()
    mapped = stage(q, q, q, None)[0]
    same(mapped.norm(dim=(1, 3)), (q / F.softplus(stage.s)[:, None]).norm(dim=(1, 3)), 1e-5)
    same(stage(3 * q, q, q, None)[0], 3 * mapped, 1e-4)


def test_flatten_without_focus_is_linear_with_relu() -> None:
    sharp = make("flatten", focusing_factor=1, kernel_size=0, qkv_bias=False, out_bias=False)
    sharp.project.qkv_proj.weight.abs_()
    x = tokens().abs()  # features of 0 are 1e-6 in one and 0 in the other
    plain = attnzoo.create("linear", 16, 4, feature_map="relu").double()
    plain.load_state_dict({k: v for k, v in sharp.state_dict().items() if "refine" not in k})
    sharp.refine[0].s.zero_()
    same(sharp(x[None]), plain(x[None]), 1e-3)


@pytest.mark.parametrize("name", ["flatten", "mala", "rala"])
def test_local_convolutions_look_back_only(name: str) -> None:
    mixer, x = make(name, pos="none"), tokens(1, T, 16)
    later = torch.cat([x[:, :7], tokens(1, T - 7, 16)], dim=1)
    assert torch.equal(mixer(later)[:, :7], mixer(x)[:, :7])


REFUSED = [
    ("linear_icl", {"icl_count": 4}, "icl_count", 4),
    ("linear_icl", {"icl_norm": "const", "icl_count": 0}, "icl_count", 0),
    ("linear_icl", {"icl_norm": "median"}, "icl_norm", "median"),
    ("pavlovian", {"lam": 1.5}, "lam", 1.5),
    ("pavlovian", {"eta": 2.5, "learn_eta": False}, "eta", 2.5),
    ("pavlovian", {"eta": 1.5}, "eta", 1.5),
    ("pavlovian", {"rule": "pearce_hall"}, "rule", "pearce_hall"),
    ("pavlovian", {"add": "flatten"}, "add", "pavlovian"),
    ("flatten", {"focusing_factor": 0.5}, "focusing_factor", 0.5),
    ("flatten", {"kernel_size": -1}, "kernel_size", -1),
    ("flatten", {"norm_scope": "token"}, "norm_scope", "token"),
    ("flatten", {"window": 4}, "window", 4),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=str)
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValueError) as caught:
        attnzoo.create(name, 32, 4, **options)
    assert re.fullmatch(rf"{field}: .{{15,}}", str(caught.value)) and str(value) in str(caught.value)


def test_flatten_refuses_documents_longer_than_its_table() -> None:
    mixer = make("flatten", learned_pos=True, pos="none", max_seq_len=8)
    with pytest.raises(ValueError, match="max_seq_len: a document has 9 tokens, there is room for 8"):
        mixer(tokens(1, 9, 16))
    ids = torch.tensor([[1] * 5 + [2] * 8])
    assert mixer(tokens(1, 13, 16), attnzoo.Context(segment_ids=ids)).isfinite().all()
