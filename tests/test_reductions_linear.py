"""What linear attention and the delta rule reduce to: sums, memories and brute-force recurrences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
import oracles
from attnzoo.attention.base import Mixer
from tiny import D, H, T, build, same, tokens


@pytest.mark.parametrize(
    "name, options",
    [
        ("linear", {}),
        ("linear", {"normalize": False, "feature_map": "identity"}),
        ("gated_deltanet", {}),
    ],
)
def test_chunks_of_any_size_agree(name: str, options: dict[str, Any]) -> None:
    x = tokens(2, 37, D)
    mixers = [build(name, chunk_size=size, **options) for size in (64, 1, 5, 16, 37)]
    for mixer in mixers[1:]:
        mixer.load_state_dict(mixers[0].state_dict())
        torch.testing.assert_close(mixer(x), mixers[0](x), rtol=1e-10, atol=1e-12)


def one_hot_tokens(name: str, count: int, **options: Any) -> tuple[Mixer, Tensor]:
    """A mixer of one head whose tokens are unit vectors, so that each weight row speaks for one token."""
    mixer = attnzoo.create(name, count, 1, max_seq_len=count, **options).double().requires_grad_(False)
    mixer.out.out_proj.weight.copy_(torch.eye(count))
    return mixer, torch.eye(count, dtype=torch.float64)[None]


@pytest.mark.parametrize("kind", ["elu1", "hedgehog", "t2r", "dpfp", "relu"])
def test_normalised_linear_weights_are_a_mean(kind: str) -> None:
    mixer, x = one_hot_tokens("linear", 8, feature_map=kind, pos="none")
    q, k, v = mixer.project.qkv_proj.weight.split(8)
    for weight, values in ((q, tokens(8, 8)), (k, tokens(8, 8)), (v, torch.eye(8))):
        weight.copy_(values.abs() if kind in ("t2r", "relu") else values)
    weights = mixer(x)[0]
    assert (weights >= 0).all() and (weights.triu(1) == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(8).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
def test_without_positions_linear_forgets_the_order(normalize: bool) -> None:
    mixer, x = build("linear", pos="none", normalize=normalize), tokens()
    order = torch.cat([torch.randperm(T - 1), torch.tensor([T - 1])])
    same(mixer(x[:, order])[:, -1], mixer(x)[:, -1])


def memory(
    keys: Tensor, values: Tensor, queries: Tensor, beta: list[float], decay: float, **options: Any
) -> Tensor:
    """What a gated_deltanet of one head reads under these unit keys, ``(T, T)``, before norm and scale.

    Entries of keys, values and queries are 0 or at least 1; ``decay`` is the log decay of each token.
    """
    n = len(keys)
    mixer, x = one_hot_tokens(
        "gated_deltanet", n, head_dim=n, expand_v=1.0, use_short_conv=False, use_gate=False, **options
    )
    mixer.combine = torch.nn.ModuleList()
    # silu(30) is 30 within 1e-11, and the norm's eps is nothing beside it
    mixer.project.qkv_proj.weight.copy_(torch.cat([30 * queries.T, 30 * keys.T, 30 * values.T]))
    gates = mixer.gates
    gates.beta.weight.copy_(torch.tensor(beta).double().logit().clamp(-40, 40)[None])
    gates.decay.weight.zero_()
    gates.dt_bias.zero_()
    gates.A_log.fill_(math.log(-decay / math.log(2)) if decay else -math.inf)
    return mixer(x)[0] / 30 * n**0.5


def test_delta_memory_recalls_overwrites_and_keeps() -> None:
    unit, values = torch.eye(6).double(), torch.eye(6).double()
    # writes under keys 0, 1, 0, 2, 3 and reads 0, 0, 1, 2, 3, 0
    keys, queries = unit[[0, 1, 0, 2, 3, 5]], unit[[0, 0, 1, 2, 3, 0]]
    beta = [1.0, 1.0, 1.0, 0.0, 1.0, 0.5]
    read = memory(keys, values, queries, beta, 0.0)
    expected = torch.stack([values[0], values[0], values[1], 0 * values[0], values[4], values[2]])
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-8)


def test_negative_eigenvalues_flip_what_a_key_held() -> None:
    unit = torch.eye(3).double()
    values = torch.stack([unit[0], torch.zeros(3).double(), torch.zeros(3).double()])
    read = memory(unit[[0, 0, 0]], values, unit[[0, 0, 0]], [0.5, 1.0, 1.0], 0.0, allow_neg_eigval=True)
    torch.testing.assert_close(read, torch.stack([unit[0], -unit[0], unit[0]]), rtol=0, atol=1e-8)


@pytest.mark.parametrize("decay", [0.0, -0.3])
def test_with_orthogonal_keys_the_delta_rule_is_a_decayed_sum(decay: float) -> None:
    n = 6
    keys, values = torch.eye(n).double(), 1 + tokens(n, n).abs()
    queries = keys[torch.randperm(n)]
    beta = [0.9, 0.2, 0.5, 0.7, 0.3, 0.6]
    S, outs = torch.zeros(n, n).double(), []
    for t in range(n):
        S = math.exp(decay) * S + beta[t] * torch.outer(keys[t], values[t])
        outs.append(S.T @ queries[t])
    read = memory(keys, values, queries, beta, decay)
    torch.testing.assert_close(read, torch.stack(outs), rtol=1e-6, atol=1e-7)


def test_without_decay_gated_deltanet_is_the_delta_rule() -> None:
    mixer, x = build("gated_deltanet", use_gate=False), tokens(1, T, D)
    mixer.gates.A_log.fill_(-math.inf)
    seen = {}
    mixer.combine[0].register_forward_pre_hook(lambda stage, args: seen.update(o=args[0]))
    mixer.scan.register_forward_pre_hook(lambda stage, args: seen.update(terms=args[0]))
    mixer(x)
    q, k, v, beta = (getattr(seen["terms"], name)[0] for name in ("q", "k", "v", "beta"))
    for h in range(H):
        rule = oracles.delta_rule(q[:, h], k[:, h], v[:, h], torch.zeros(T).double(), beta[:, h])
        same(seen["o"][0, :, h], rule)


@pytest.mark.parametrize("rate", [-60.0, 60.0])
def test_extreme_decays_are_finite(rate: float) -> None:
    mixer, x = build("gated_deltanet").requires_grad_(True), tokens().requires_grad_()
    with torch.no_grad():
        mixer.gates.A_log.fill_(rate)
    y = mixer(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
