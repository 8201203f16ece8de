"""kdgqa and dgqa: who reads which head, and how allocations follow the keys of past steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sharing import accepts, attend, build, each_row, heads_of, refuses
from torch import Tensor

import attnzoo
from attnzoo import Context
from attnzoo.attention.base import Mixer
from attnzoo.attention.sharing import kdgqa as rules
from attnzoo.context import Collector
from tiny import D, H, T, same, tokens, with_weights_of

GOLDEN = Path(__file__).parents[1] / "golden"
ROWS = [c for n in ("kdgqa", "dgqa") for c in torch.load(GOLDEN / f"{n}.op.pt")["extra"]["cases"]]


def step(mixer: Mixer, number: int, *inputs: Tensor, **fields: Any) -> dict[str, Tensor]:
    """One optimiser step as the trainer makes it: statistics averaged over micro-batches."""
    stats: dict[str, Tensor] = {}
    for x in inputs:
        collector = Collector()
        mixer(x, Context(collector=collector, **fields))
        for name, layers in collector.steps.items():
            stats[name] = stats.get(name, 0.0) + layers[mixer.site.layer] / len(inputs)
    mixer.on_step(number, stats, torch.Generator())
    return stats


# kdgqa, dgqa


@pytest.mark.parametrize("case", ROWS, ids=[f"{c.get('kind', 'key')}-{i}" for i, c in enumerate(ROWS)])
def test_allocation_of_the_released_code(case: dict[str, Any]) -> None:
    n, heads = case["k_norms"], case["num_heads"]
    if "kind" in case:
        line = attnzoo.attention.timeline.read(Context(), len(case["k"]), case["k"].shape[2], n.device)
        same(rules.key_norms(case["k"], line) * len(case["k"]), n)
        alloc = rules.by_share(rules.statistic(n, case["cache"], case["kind"]), heads)
    else:
        alloc = rules.by_norm(n, heads)
    assert alloc == case["alloc"].tolist()
    if "idx" in case:
        groups = case["num_kv_heads"]
        mixer = attnzoo.create("kdgqa", 2 * heads, heads, num_kv_heads=groups, min_per_group=0)
        mixer.project.allocate(alloc)
        assert mixer.project.k_map.tolist() == case["idx"].tolist()
    # a factor common to all norms, as of a mean over sequences, ranks and micro-batches, changes nothing
    other = (rules.statistic(n / 7, case["cache"] / 7, case["kind"]),) if "kind" in case else (n / 7,)
    assert (rules.by_share if "kind" in case else rules.by_norm)(*other, heads) == alloc


def test_map_and_order_of_heads_of_the_released_code() -> None:
    """Bidirectional, without positions, with a bias at the end; the last token sees all in a causal form."""
    case, options = ROWS[0], {"num_kv_heads": 4, "min_per_group": 0, "pos": "none", "out_bias": True}
    mixer = attnzoo.create("kdgqa", 32, 8, **options).double()
    weights = torch.cat([case["W_q"], case["W_k"], case["W_v"]], dim=1).T
    mixer.project.qkv_proj.weight.data = weights
    mixer.out.out_proj.weight.data, mixer.out.out_proj.bias.data = case["W_o"].T, case["b_o"]
    assert mixer.project.alloc.tolist() == [2, 2, 2, 2]
    stats = step(mixer, 1, case["x"])
    same(stats["key_norms"] * 3, case["k_norms"])
    assert mixer.project.alloc.tolist() == case["alloc"].tolist()
    assert mixer.project.k_map.tolist() == mixer.project.v_map.tolist() == case["idx"].tolist()
    same(mixer(case["x"])[:, -1], case["y_bidirectional"][:, -1])


@pytest.mark.parametrize("name", ["kdgqa", "dgqa"])
def test_uniform_allocation_is_gqa(name: str) -> None:
    mixer, x = build(name, num_kv_heads=2), tokens()
    same(with_weights_of(mixer, build("gqa", num_kv_heads=2))(x), mixer(x))
    mixer.project.allocate([3, 1])
    blocks = heads_of(mixer.project.qkv_proj.weight, H + 4)

    def one(x: Tensor) -> Tensor:
        k, v = ([x @ blocks[H + side + g] for g in (0, 0, 0, 1)] for side in (0, 2))
        return attend([x @ W for W in blocks[:H]], k, v)

    each_row(mixer, one)
    loaded = attnzoo.create(name, D, H, num_kv_heads=2).double()
    loaded.load_state_dict(mixer.state_dict())
    same(loaded(x), mixer(x))


def test_two_groups_leave_the_smaller_one_nothing_unless_it_keeps_some() -> None:
    assert rules.by_norm(torch.tensor([1.0, 3.0]), 8) == [0, 8]
    assert rules.at_least([0, 8], 1) == [1, 7] and rules.at_least([0, 5, 3], 2) == [2, 3, 3]
    assert rules.by_norm(torch.ones(3), 7) == rules.by_share(torch.zeros(3), 7) == [3, 2, 2]
    assert rules.by_share(torch.tensor([1.0, 1.0, 1.0]), 8) == [2, 3, 3]  # 2.67 each: one has to give


def test_dgqa_refreshes_at_windows_and_remembers() -> None:
    for kind in ("diff", "ema"):
        mixer = build("dgqa", num_kv_heads=3, alloc_kind=kind, window_size=2).train()
        matrices, c = heads_of(mixer.project.qkv_proj.weight, H + 6)[H : H + 3], torch.zeros(3).double()
        for number in range(1, 7):
            before, inputs = copy.deepcopy(mixer.project.alloc), [tokens() for _ in range(2)]
            step(mixer, number, *inputs)
            if number % 2:
                assert torch.equal(mixer.project.alloc, before)
                continue
            keys = [torch.stack([x @ W for W in matrices]) for x in inputs]  # (G, B, T, d)
            n = sum(z.square().sum((2, 3)).sqrt().mean(1) for z in keys) / 2
            u = (c - n).abs() if kind == "diff" else 0.9 * n + 0.1 * c
            c = n if kind == "diff" else u
            same(mixer.project.c, c)
            assert mixer.project.alloc.tolist() == rules.at_least(rules.by_share(u, H), 1)


def test_kdgqa_map_does_not_read_the_batch_it_serves() -> None:
    mixer, x = build("kdgqa", num_kv_heads=2).train(), tokens()
    y, later = mixer(x, Context(collector=Collector())), x.clone()
    later[:, 5:], later[1] = 30 * later[:, 5:], -later[1]
    same(mixer(later, Context(collector=Collector()))[0, :5], y[0, :5])
    step(mixer, 1, x)
    assert sorted(mixer.project.alloc.tolist()) == [1, 3]  # only a step changes it
    kept = mixer.project.alloc.clone()
    mixer.eval()
    assert not step(mixer, 2, -3 * later)  # nothing is reported
    for norms in ([1.0, 9.0], [9.0, 1.0]):
        mixer.on_step(3, {"key_norms": torch.tensor(norms)}, torch.Generator())
        assert torch.equal(mixer.project.alloc, kept)


def test_padding_and_broken_statistics_do_not_count() -> None:
    mixer, x = build("kdgqa", num_kv_heads=2, qkv_bias=True).train(), tokens()
    ids = torch.ones(2, T, dtype=torch.long)
    ids[:, 6:] = 0
    padded = step(mixer, 1, x, segment_ids=ids)
    same(padded["key_norms"], step(mixer, 2, x[:, :6])["key_norms"])
    before = mixer.project.alloc.clone()
    mixer.on_step(3, {"key_norms": torch.tensor([float("nan"), 1.0])}, torch.Generator())
    assert torch.equal(mixer.project.alloc, before)


REFUSED: list[tuple[str, dict[str, Any], str, object]] = [
    ("kdgqa", {"num_kv_heads": 1}, "num_kv_heads", 1),
    ("dgqa", {"add": ("mqa",)}, "num_kv_heads", 1),
    ("kdgqa", {"num_kv_heads": 5}, "num_kv_heads", 5),
    ("kdgqa", {"num_kv_heads": 3, "min_per_group": 2}, "min_per_group", 2),
    ("dgqa", {"min_per_group": -1}, "min_per_group", -1),
    ("dgqa", {"window_size": 0}, "window_size", 0),
    ("dgqa", {"alloc_kind": "mean"}, "alloc_kind", "mean"),
    ("mla", {"add": ("dgqa",)}, "add", "project"),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED)
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    refuses(name, options, field, value)


@pytest.mark.parametrize(
    "name, options",
    [
        ("kdgqa", {"add": ("kv_shift", "moh"), "num_kv_heads": 3, "window": 4, "qk_norm": True}),
        ("dgqa", {"add": ("sqa",), "num_query_heads": 2, "num_kv_heads": 2, "output_gate": "headwise"}),
    ],
)
def test_accepted(name: str, options: dict[str, Any]) -> None:
    accepts(name, options)
