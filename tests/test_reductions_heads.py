"""What variants that map, mix, route or gate heads reduce to: the host they start from, and each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnzoo.attention.stages.combine import Gate
from attnzoo.context import Collector, Context
from tiny import H, T, build, d, same, tokens, with_weights_of

HOSTS = [
    ("gqa", {"num_kv_heads": 2}),
    ("sliding_window", {"window": 3}),
    ("gated_deltanet", {}),
    ("linear", {}),
]


@pytest.mark.parametrize("kind, targets", [("linear", "qkv"), ("mlp", "qkv"), ("mlp", "v"), ("gate", "v")])
@pytest.mark.parametrize("name, options", [*HOSTS, ("mla", {})])
def test_kha_starts_as_its_host(name: str, options: dict[str, Any], kind: str, targets: str) -> None:
    if name == "mla" and kind != "linear":
        return
    host = build(name, **options)
    knocking = with_weights_of(host, build(name, add=("kha",), kind=kind, targets=tuple(targets), **options))
    x = tokens()
    assert torch.equal(knocking(x), host(x))


@pytest.mark.parametrize("bias", [False, True])
def test_linear_kha_folds_into_its_host(bias: bool) -> None:
    options = {"num_kv_heads": 2, "qk_norm": True, "qkv_bias": bias}
    host, x = build("gqa", **options), tokens()
    knocking = with_weights_of(host, build("kha", kind="linear", **options))
    maps = {t: getattr(knocking.refine[0], f"T_{t}").copy_(tokens(d, d)) for t in "qkv"}
    for name, param in host.project.named_parameters():
        param.copy_(torch.randn_like(param))
        knocking.project.get_parameter(name).copy_(param)
        heads = param.reshape(H + 2 + 2, d, -1)
        which = "q" * H + "kkvv"
        folded = [maps[t].T @ z for t, z in zip(which, heads, strict=True)]
        param.copy_(torch.stack(folded).reshape(param.shape))
    same(knocking(x), host(x))


def test_a_rotation_of_queries_and_keys_leaves_scores_alone() -> None:
    host, x = build("mha", pos="none"), tokens()
    knocking = with_weights_of(host, build("kha", kind="linear", targets=("q", "k"), pos="none"))
    turn = torch.linalg.qr(tokens(d, d)).Q
    for t in "qk":
        getattr(knocking.refine[0], f"T_{t}").copy_(turn)
    same(knocking(x), host(x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"static_proj": False},
        {"window": 4},
        {"num_kv_heads": 2, "expand_kv": True},
    ],
)
def test_dcmha_starts_as_its_host(options: dict[str, Any]) -> None:
    composed, x = build("dcmha", zero_init=True, **options), tokens()
    plain = {k: v for k, v in options.items() if k in ("window", "num_kv_heads")}
    host = with_weights_of(composed, build("gqa", **{"num_kv_heads": H, **plain}, qk_norm=True))
    same(composed(x), host(x))


def test_static_compositions_that_permute_heads_and_back_are_mha() -> None:
    options = {"query_wise": False, "key_wise": False, "zero_init": True}
    composed, x = build("dcmha", **options), tokens()
    swap = torch.eye(H).double()[torch.tensor([1, 2, 3, 0])]
    composed.score.W_b_pre.copy_(swap - torch.eye(H))
    composed.score.W_b_post.copy_(swap.T - torch.eye(H))
    same(composed(x), with_weights_of(composed, build("mha", qk_norm=True))(x))


@pytest.mark.parametrize("name, options", [("mha", {}), ("mla", {}), *HOSTS])
@pytest.mark.parametrize("shared_heads", [0, 1, 2])
def test_moh_with_zero_routers_and_all_heads_is_its_host(
    name: str, options: dict[str, Any], shared_heads: int
) -> None:
    host, x = build(name, **options), tokens()
    routed = build(name, add=("moh",), shared_heads=shared_heads, active_heads=H, **options)
    with_weights_of(host, routed)
    for param in routed.combine[-1].parameters():
        param.zero_()
    same(routed(x), host(x))


@pytest.mark.parametrize("shared_heads, active", [(0, 3), (1, 3), (2, 3)])
def test_moh_gates_sum_to_the_balanced_number_of_heads(shared_heads: int, active: int) -> None:
    mixer, collector, x = build("moh", shared_heads=shared_heads, active_heads=active), Collector(), tokens()
    for param in mixer.combine[0].parameters():
        param.copy_(torch.randn_like(param))
    mixer(x, Context(collector=collector))
    gate = collector.stats["moh/gate"][0]
    share = torch.tensor([0.0, 1.0]).double().expand(2, T, 2)
    if shared_heads:
        share = 2 * (x @ mixer.combine[0].scores["balance"].weight.T).softmax(-1)
    same(gate.sum(-1), share @ torch.tensor([shared_heads, active - shared_heads]).double())
    assert ((gate > 0).sum(-1) == active).all()


@pytest.mark.parametrize("name", ["mla", "gqa", "linear", "gated_deltanet"])
@pytest.mark.parametrize("form", ["headwise", "elementwise"])
def test_gates_of_zero_halve_the_host_and_rescaled_are_the_host(name: str, form: str) -> None:
    options = {"use_gate": False} if name == "gated_deltanet" else {}
    host, x = build(name, **options), tokens()
    gated = with_weights_of(host, build(name, output_gate=form, **options))
    gate = next(stage for stage in gated.combine if isinstance(stage, Gate))
    gate.gate.weight.zero_()
    same(gated(x), host(x) / 2)
    gate.rescale = 2.0
    same(gated(x), host(x))
