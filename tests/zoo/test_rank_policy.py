"""The learned rank policy: causal decisions segment by segment, and what its reward asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.attention.base import Mixer
from attnzoo.context import Collector, Context
from test_refusals import run
from tiny import D, T, build, d, same, tokens
from zoo.test_dynamic_rank import oracle, step

L = 3
LEARNED = {"rank_policy": "rl", "segment_len": L, "ranks": (1, 2, 3, 4), "safety": 1.0}


def learned(**options: Any) -> Mixer:
    mixer = build("dynamic_rank", **(LEARNED | options))
    policy = mixer.refine[0]
    for param in (policy.conv_bias, policy.head[2].bias):
        param.normal_()
    policy.previous.weight.normal_(std=4)  # the previous rank should matter
    return mixer


def ranks_of(mixer: Mixer, x: Tensor, ids: Tensor | None = None) -> Tensor:
    collector = Collector()
    mixer(x, Context(segment_ids=ids, collector=collector))
    return collector.stats["dynamic_rank/rank"][0]


def policy_oracle(mixer: Mixer, x: Tensor) -> list[int]:
    """The rank of every token of one document, segment by segment."""
    p, ranks = mixer.refine[0], []
    taps = p.conv.weight.unflatten(0, (3, 64))  # two back, one back, the token
    action = len(p.ranks) - 1
    for start in range(0, len(x), L):
        if start:
            pooled = torch.zeros(64).double()
            for t in range(start - L, start):
                y = p.conv_bias.clone()
                for back in range(min(2, t - start + L) + 1):
                    y = y + taps[2 - back] @ x[t - back]
                pooled = pooled + y.relu() / L
            z = torch.cat([pooled, p.weights(p.measured), p.previous.weight[action]])
            for layer in p.layers:
                z = layer.first(z + layer.mix(layer.value(z)))
                z = layer.second(z + layer.down(layer.up(z).relu()))
            action = int(p.head(z).masked_fill(p.change[action] > p.safety, -torch.inf).argmax())
        ranks += [p.ranks[action]] * len(x[start : start + L])
    return ranks


def test_learned_ranks_segment_by_segment() -> None:
    mixer, x, found = learned().eval(), tokens(4, T, D), set()
    y, ranks = mixer(x), ranks_of(mixer, x)
    for b in range(4):
        assert ranks[b].tolist() == policy_oracle(mixer, x[b])
        same(y[b], oracle(x[b], mixer, ranks[b]))
        found |= set(ranks[b].tolist())
    assert len(found) > 1, "the segments should differ"
    same(run(mixer, x, [2, 1, 5, 1]), y)
    ids, x = torch.tensor([[1] * 8 + [2] * 7] * 4), tokens(4, 15, D)
    packed = ranks_of(mixer, x, ids)
    for b in range(4):
        assert packed[b, :8].tolist() == policy_oracle(mixer, x[b, :8])
        assert packed[b, 8:].tolist() == policy_oracle(mixer, x[b, 8:])


def test_rank_of_a_segment_does_not_depend_on_its_own_tokens() -> None:
    mixer, x = learned().eval(), tokens(8, T, D)
    other = torch.cat([x[:, :L], 3 * tokens(8, T - L, D)], dim=1)
    before, after = ranks_of(mixer, x), ranks_of(mixer, other)
    assert (before[:, :L] == d).all(), "the first segment has the largest rank"
    assert torch.equal(before[:, : 2 * L], after[:, : 2 * L])
    assert not torch.equal(before[:, 2 * L :], after[:, 2 * L :])


def test_safety_bounds_the_change_and_exploration_obeys_it() -> None:
    mixer = step(learned(safety=0.6), 1).train()
    policy, x = mixer.refine[0], tokens(8, T, D)
    kept = mixer.project.order().square().sum(0).cumsum(0)
    kept = kept / kept[-1]
    same(policy.change, (kept[:, None] - kept).abs().sqrt())
    for action in range(4):
        policy.explore.fill_(action)
        ranks = ranks_of(mixer, x)[:, ::L].long() - 1
        taken = policy.change[ranks[:, :-1], ranks[:, 1:]]
        assert (taken <= 0.6).all()
        allowed = policy.change[ranks[:, :-1], action] <= 0.6
        assert (ranks[:, 1:][allowed] == action).all(), "what is drawn is done where it may be"
    assert (policy.change > 0.6).any()


def test_exploration_fades_and_never_touches_evaluation() -> None:
    mixer, x = learned(max_seq_len=30000), tokens()
    shares = [(step(mixer, n).refine[0].explore >= 0).double().mean().item() for n in (1, 400)]
    assert shares[0] == pytest.approx(0.1, rel=0.1) and shares[1] == pytest.approx(0.1 * 0.995**400, rel=0.3)
    before = [ranks_of(mixer.train(mode), x) for mode in (False, True)]
    mixer.refine[0].explore.fill_(0)
    after = [ranks_of(mixer.train(mode), x) for mode in (False, True)]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_reward_prefers_ranks_whose_output_is_whole() -> None:
    mixer, x = learned().train(), tokens(16, T, D)
    mixer.requires_grad_(True)
    policy, collector = mixer.refine[0], Collector()
    policy.explore.copy_(torch.arange(len(policy.explore)) % 2 * 3)  # rank 4 and rank 1 in turn
    mixer(x, Context(collector=collector))
    loss, weight = collector.losses["dynamic_rank/policy"][0]
    assert weight == 0.1
    loss.backward()
    grad = policy.head[2].bias.grad
    assert grad[0] > 0 > grad[3], "descent lowers the logit of rank 1 and raises that of rank 4"
    reached = {name for name, p in mixer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    own = {name for name, _ in mixer.named_parameters() if name.startswith("refine")}
    assert reached == own, "the loss trains the policy and nothing else"
