"""Rank policies: what a rank does to scores, who chooses it when, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo.attention.base import Mixer
from attnzoo.attention.factorised.ordered import default_ranks, energy_rank
from oracles import attend, causal, rotate, split
from test_refusals import named, run
from tiny import D, H, T, build, d, same, tokens

REFUSED = [
    ("dynamic_rank", {"ranks": ()}, "ranks", "[]"),
    ("dynamic_rank", {"ranks": (3, 2)}, "ranks", "[3, 2]"),
    ("dynamic_rank", {"ranks": (2, 2)}, "ranks", "[2, 2]"),
    ("dynamic_rank", {"ranks": (0, 2)}, "ranks", "[0, 2]"),
    ("dynamic_rank", {"ranks": (2, d + 1)}, "ranks", d + 1),
    ("dynamic_rank", {"segment_len": 0}, "segment_len", 0),
    ("dynamic_rank", {"refresh": 0}, "refresh", 0),
    ("dynamic_rank", {"energy_tau": 0.0}, "energy_tau", 0.0),
    ("dynamic_rank", {"safety": 1.5}, "safety", 1.5),
    ("dynamic_rank", {"rank_policy": "svd"}, "rank_policy", "svd"),
    ("dynamic_rank", {"rank_policy": "energy", "qk_norm": True}, "rank_policy", "energy"),
    ("dynamic_rank", {"rank_policy": "rl", "add": "kha", "kind": "linear"}, "rank_policy", "rl"),
    ("dynamic_rank", {"rank_policy": "energy", "add": "masa"}, "rank_policy", "energy"),
    ("dynamic_rank", {"qk_rope_head_dim": 0}, "qk_rope_head_dim", 0),
    ("dynamic_rank", {"qk_rope_head_dim": 3}, "qk_rope_head_dim", 3),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=named(REFUSED))
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: .{{15,}}") as caught:
        attnzoo.create(name, D, H, **options)
    assert str(value) in str(caught.value)


def step(mixer: Mixer, number: int, seed: int = 0) -> Mixer:
    mixer.on_step(number, {}, torch.Generator().manual_seed(seed))
    return mixer


def oracle(x: Tensor, mixer: Mixer, ranks: Tensor, pos: str = "rope") -> Tensor:
    """``(T, D)`` of one document whose token i reads ``ranks[i]`` channels of its query."""
    f = mixer.project
    G = f.heads[1]
    q, k, v = (split(x @ m.weight.T, n) for m, n in ((f.a_proj, H), (f.b_proj, G), (f.v_proj, G)))
    keep = torch.arange(d) < ranks[:, None]
    q = [z * keep for z in q]
    if pos == "rope":
        turned = [rotate(z, 10000.0) for z in split(x @ f.rope_proj.weight.T, H + 1)]
        q = [torch.cat([z, r], dim=1) for z, r in zip(q, turned, strict=False)]
        k = [torch.cat([z, turned[H]], dim=1) for z in k]
    return attend(q, k, v, causal(len(x))).flatten(1) @ mixer.out.out_proj.weight.T


@pytest.mark.parametrize("pos", ["rope", "none"])
@pytest.mark.parametrize("groups", [H, 2])
@pytest.mark.parametrize("r", [1, 3, d])
def test_fixed_rank_reads_the_first_channels_at_one_scale(r: int, groups: int, pos: str) -> None:
    mixer = build("dynamic_rank", rank_policy="fixed", ranks=(r,), num_kv_heads=groups, pos=pos)
    x, ranks = tokens(), torch.full((T,), r)
    for row, y in zip(x, mixer(x), strict=True):
        same(y, oracle(row, mixer, ranks, pos))
    same(run(mixer, x, [1, 4, 1, 3]), mixer(x))
    rows = {name: z.shape[-1] for name, z in mixer.new_cache(1, T).slots.items()}
    assert rows == {"k": r, "v": d} | ({"k_rope": 2} if pos == "rope" else {})


@pytest.mark.parametrize("policy", ["nested", "energy", "rl"])
def test_every_policy_with_one_rank_is_the_fixed_one(policy: str) -> None:
    options = {"ranks": (d,), "segment_len": 2}
    mixer, fixed = (build("dynamic_rank", rank_policy=p, **options) for p in (policy, "fixed"))
    fixed.load_state_dict(mixer.state_dict(), strict=False)
    x = tokens()
    same(mixer(x), fixed(x))
    step(mixer, 1)
    same(mixer(x), fixed(x))  # ordering the channels changes no score


def test_ordering_gives_the_best_truncation_and_keeps_the_whole() -> None:
    mixer = build("dynamic_rank", num_kv_heads=2, qkv_bias=True)
    for bias in (mixer.project.a_proj.bias, mixer.project.b_proj.bias):
        bias.normal_()
    x, f = tokens(), mixer.project
    before = mixer(x)

    def products() -> Tensor:
        """Per group the query heads' A over each other times B^T, biases included."""
        a = torch.cat([f.a_proj.weight, f.a_proj.bias[:, None]], dim=1).view(2, H // 2, d, D + 1)
        b = torch.cat([f.b_proj.weight, f.b_proj.bias[:, None]], dim=1).view(2, 1, d, D + 1)
        return torch.stack([a[:, :, c, :, None] * b[:, :, c, None] for c in range(d)]).flatten(2, 3)

    whole = products().sum(0)
    sigma = f.order()
    same(mixer(x), before)
    same(products().sum(0), whole)
    same(sigma, torch.linalg.svdvals(whole)[:, :d])
    for r in range(d):
        error = (whole - products()[:r].sum(0)).flatten(1).square().sum(1)
        same(error, sigma[:, r:].square().sum(1))


def test_nested_draws_in_training_and_is_whole_in_evaluation() -> None:
    mixer, x = build("dynamic_rank", ranks=(1, 2, 4)), tokens()
    whole, seen = mixer.eval()(x), set()
    for number in range(1, 20):
        step(mixer.train(), number, seed=number)
        r = mixer.refine[0].now()
        seen.add(r)
        same(mixer(x)[0], oracle(x[0], mixer, torch.full((T,), r)))
        assert torch.equal(mixer.eval()(x), whole)
    assert seen == {1, 2, 4}
    again = build("dynamic_rank", ranks=(1, 2, 4)).train()
    again.load_state_dict(mixer.train().state_dict())
    assert torch.equal(again(x), mixer(x)), "a resumed run goes on at the drawn rank"


def test_costs_follow_the_rank() -> None:
    mixer = build("dynamic_rank", ranks=(1, 2, 4), impl="reference").train()
    costs = {}
    for seed in range(8):
        step(mixer, 1, seed)
        with FlopCounterMode(display=False) as counter:
            mixer(tokens())
        costs[mixer.refine[0].now()] = mixer.cost(T).executed_flops
        assert counter.get_total_flops() / (2 * T) == costs[mixer.refine[0].now()]
    assert costs[1] < costs[2] < costs[4] == mixer.eval().cost(T).executed_flops
    assert mixer.cost(T).exact and not build("dynamic_rank", rank_policy="rl").cost(T).exact


def test_energy_keeps_the_share_of_every_group() -> None:
    sigma = torch.tensor([[3.0, 1.0, 0.5, 0.0], [2.0, 2.0, 0.1, 0.1]]).sqrt().double()
    assert [energy_rank(sigma, (1, 2, 3, 4), tau) for tau in (0.4, 0.478, 0.9, 0.96, 1.0)] == [1, 2, 3, 3, 4]
    assert energy_rank(sigma, (1, 3), 0.6) == 3 and energy_rank(sigma, (1,), 0.9) == 1
    mixer, x = build("dynamic_rank", rank_policy="energy", ranks=(1, 2, 3, 4), refresh=10), tokens()
    mixer.project.a_proj.weight.view(H, d, D)[:, 2:] *= 1e-3
    assert step(mixer, 2).refine[0].now() == d
    assert step(mixer, 10).refine[0].now() == 2
    same(mixer(x)[0], oracle(x[0], mixer, torch.full((T,), 2)))
    again = build("dynamic_rank", rank_policy="energy", ranks=(1, 2, 3, 4))
    again.load_state_dict(mixer.state_dict())
    same(again(x), mixer(x))
    assert default_ranks(64) == (16, 24, 32, 40, 48, 56, 64) and default_ranks(2) == (1, 2)
