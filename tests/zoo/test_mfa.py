"""Matrix factorisation attention: what it reduces to, loops over its equations, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.context import Context
from golden import load_spec_weights
from oracles import causal, rms, rotate, softmax_rows, split
from test_golden import decode
from tiny import D, H, build, same, tokens

C, R = 6, 5
REFUSED: list[tuple[str, dict[str, Any], str, object]] = [
    ("mfa", {"q_rank": 0}, "q_rank", 0),
    ("mfa", {"q_rank": D + 1}, "q_rank", D + 1),
    ("mfa", {"num_kv_heads": 2}, "num_kv_heads", 2),
    ("mfa", {"head_dim": 5}, "head_dim", 5),
    ("mfa", {"out_factor": "half"}, "out_factor", "half"),
    ("mfa_kr", {"q_rank": D + 1}, "q_rank", D + 1),
    ("mfa_kr", {"num_kv_heads": 2}, "num_kv_heads", 2),
    ("mfa_kr", {"head_dim": 5}, "head_dim", 5),
    ("mfa_kr", {"add": "kha", "kind": "mlp"}, "kind", "mlp"),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=str)
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}") as error:
        attnzoo.create(name, D, H, **options)
    assert str(value) in str(error.value)


def factorised(x: Tensor, w: dict[str, Tensor], theta: float | None, window: int | None) -> Tensor:
    """Either variant: one value row per key, summed over rows."""
    c = x @ w["S_q"]
    c = rms(c, w["gamma"]) if "gamma" in w else c
    queries = split(c @ w["Q"] + w.get("b_q", 0.0), H)
    k = x @ w["S_k"] + w.get("b_k", 0.0)
    if "S_v" in w:
        v = x @ w["S_v"] + w.get("b_v", 0.0)
    else:
        v = torch.stack([row + w["alpha"] * torch.mv(w["N"], row) for row in k])
    seen, k, outs = causal(len(x), window), rotate(k, theta), []
    for q in queries:
        outs.append(softmax_rows(rotate(q, theta) @ k.T / C**0.5, seen) @ v)
    if "W_o" in w:
        return torch.cat(outs, dim=1) @ w["W_o"]
    per_head = w["O"].split(C)
    return sum(o @ m for o, m in zip(outs, per_head, strict=True)) @ w["S_o"]


def drawn(name: str, **options: Any) -> dict[str, Tensor]:
    shapes = {"S_q": (D, R), "Q": (R, H * C), "S_k": (D, C)}
    shapes |= {"S_v": (D, C)} if name == "mfa" else {"N": (C, C), "alpha": (C,)}
    if options.get("q_norm", True):
        shapes["gamma"] = (R,)
    if options.get("qkv_bias"):
        shapes |= {"b_q": (H * C,), "b_k": (C,)} | ({"b_v": (C,)} if name == "mfa" else {})
    shared = options.get("out_factor") == "shared"
    shapes |= {"O": (H * C, C), "S_o": (C, D)} if shared else {"W_o": (H * C, D)}
    return {symbol: torch.randn(shape, dtype=torch.float64) * 0.7 for symbol, shape in shapes.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q_norm": False, "out_factor": "shared"},
        {"qkv_bias": True},
        {"pos": "none", "window": 3},
        {"window": 2, "out_factor": "shared", "rope_theta": 100.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["mfa", "mfa_kr"])
def test_equations(name: str, options: dict[str, Any]) -> None:
    w, x = drawn(name, **options), tokens()
    mixer = attnzoo.create(name, D, H, head_dim=C, q_rank=R, **options).double()
    load_spec_weights(mixer.requires_grad_(False), w)
    theta = None if options.get("pos") == "none" else options.get("rope_theta", 10000.0)
    expected = torch.stack([factorised(row, w, theta, options.get("window")) for row in x])
    same(mixer(x), expected)
    same(decode(mixer, x, 4), expected)


def test_mfa_without_a_bottleneck_is_mqa() -> None:
    host, x = build("mqa", head_dim=C), tokens()
    mixer = build("mfa", head_dim=C, q_rank=D, q_norm=False)
    q, k, v = host.project.qkv_proj.weight.split([H * C, C, C])
    mixer.project.q_down.weight.copy_(torch.eye(D))
    mixer.project.q_up.weight.copy_(q)
    mixer.project.kv_proj.weight.copy_(torch.cat([k, v]))
    mixer.out.load_state_dict(host.out.state_dict())
    same(mixer(x), host(x))


def test_shared_output_is_a_full_one_of_low_rank() -> None:
    shared, full, x = build("mfa", head_dim=C, out_factor="shared"), build("mfa", head_dim=C), tokens()
    full.project.load_state_dict(shared.project.state_dict())
    full.out.out_proj.weight.copy_(shared.out.out_proj.weight @ shared.out.per_head.weight)
    same(shared(x), full(x))
    assert torch.linalg.matrix_rank(full.out.out_proj.weight) == C


@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_key_reuse_is_an_mfa_with_tied_values(alpha: float) -> None:
    reuse, mixer, x = build("mfa_kr", head_dim=C), build("mfa", head_dim=C), tokens()
    p = reuse.project
    assert not p.alpha.any(), "values are keys at the start"
    p.alpha.copy_(alpha * torch.randn(C))
    tied = {n: z for n, z in reuse.state_dict().items() if n in mixer.state_dict() and "kv_proj" not in n}
    mixer.load_state_dict(mixer.state_dict() | tied)
    k = p.kv_proj.weight
    mixer.project.kv_proj.weight.copy_(torch.cat([k, k + p.alpha[:, None] * (p.mix.weight @ k)]))
    same(reuse(x), mixer(x))


def test_cached_keys_are_turned_where_they_were_given() -> None:
    """Positions that jump: the cached key has none, it is turned at its own place when it is read."""
    mixer, x = build("mfa_kr", head_dim=C), tokens()
    where = torch.tensor([[0, 1, 5, 6, 20, 21, 22, 40, 41]])
    whole, cache = mixer(x, Context(positions=where)), mixer.new_cache(2, 9)
    parts = [mixer(x[:, i : i + 1], Context(positions=where[:, i : i + 1]), cache) for i in range(9)]
    same(torch.cat(parts, dim=1), whole)
    same(cache.slots["key"][:, 0], mixer.project.kv_proj(x))
