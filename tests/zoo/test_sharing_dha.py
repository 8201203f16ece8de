"""dha: tables by layer, and the fusion of heads into one per group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_sharing import accepts, attend, build, each_row, heads_of, refuses
from test_sharing_maps import step
from torch import Tensor

import attnzoo
from attnzoo import Context
from attnzoo.attention.base import Mixer
from attnzoo.attention.sharing.dha import collapse
from attnzoo.context import Collector
from tiny import D, H, T, d, same, tokens, with_weights_of


def test_dha_reads_by_its_tables() -> None:
    keys, values = (2, 0, 1, 0), (1, 0, 0, 1)
    mixer = build("dha", key_map=keys, value_map=values, qkv_bias=False)
    blocks = heads_of(mixer.project.qkv_proj.weight, H + 5)

    def one(x: Tensor) -> Tensor:
        k, v = [x @ blocks[H + g] for g in keys], [x @ blocks[H + 3 + g] for g in values]
        return attend([x @ W for W in blocks[:H]], k, v)

    each_row(mixer, one)
    assert mixer.new_cache(1, 10).nbytes == 10 * 8 * 5 * d


def test_dha_reduces_to_gqa_and_mha() -> None:
    x = tokens()
    for name, count in (("gqa", 2), ("mha", H)):
        mixer = build("dha", num_key_heads=count, num_value_heads=count)
        options = {"num_kv_heads": 2} if name == "gqa" else {}
        same(with_weights_of(mixer, build(name, **options))(x), mixer(x))


def test_dha_counts_and_tables_by_layer() -> None:
    tables = ((0, 0, 1, 1), (0, 1, 2, 1))
    options = {"num_key_heads": (2, 3), "num_value_heads": [1, 4], "key_map": tables, "dim": 16, "depth": 2}
    model = attnzoo.create_model("dha", num_heads=4, **options)
    assert [m.project.heads for m in model.mixers] == [(4, 2, 1), (4, 3, 4)]
    assert [tuple(m.project.k_map.tolist()) for m in model.mixers] == list(tables)
    assert [m.project.v_map.tolist() for m in model.mixers] == [[0] * 4, [0, 1, 2, 3]]
    assert model.new_cache(1, 5).nbytes == 5 * 4 * (3 + 7) * 4
    model(torch.randint(0, 9, (1, 6)))


FUSION = {"key_map": (0, 1, 1, 0), "value_map": (0, 0, 0, 1), "fusion": True}


def fused_by_loops(mixer: Mixer) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """W~ of every key and every value head ``(D, d)``, and the fusion loss."""
    project, losses, found = mixer.project, [], []
    blocks = heads_of(project.qkv_proj.weight, 3 * H)
    for side, omega in enumerate((project.omega_k, project.omega_v)):
        table, start, tilde = project.tables[side], 0, [None] * H
        for g in range(max(table) + 1):
            own = [h for h in range(H) if table[h] == g]
            w = omega[start : start + len(own) ** 2].view(len(own), len(own))
            start += len(own) ** 2
            for i, h in enumerate(own):
                tilde[h] = sum(w[i, j] * blocks[H + side * H + other] for j, other in enumerate(own))
            pairs = [(tilde[a] - tilde[b]).square().mean() for a in own for b in own]
            losses.append(sum(pairs) / len(own) ** 2)
        found.append(tilde)
    return *found, torch.stack(losses).mean()


def test_fusion_mixes_weights_inside_groups() -> None:
    mixer = build("dha", **FUSION)
    keys, values, loss = fused_by_loops(mixer)
    queries = heads_of(mixer.project.qkv_proj.weight, 3 * H)[:H]
    each_row(mixer, lambda x: attend([x @ W for W in queries], *([x @ W for W in z] for z in (keys, values))))
    same(step(mixer, 1, tokens())["dha/fusion"], loss)
    # a group that has not come together is replaced by its mean
    means = [torch.stack(z).mean(0) for z in ((keys[0], keys[3]), (keys[1], keys[2]), values[:3], values[3:])]
    same(heads_of(collapse(mixer)["project.qkv_proj.weight"], H + 4)[H:], torch.stack(means))


@pytest.mark.parametrize("bias", [False, True])
def test_fusion_starts_as_mha_and_collapses_at_zero_loss(bias: bool) -> None:
    x, options = tokens(), FUSION | {"qkv_bias": bias}
    fresh = attnzoo.create("dha", D, H, **options).double()
    same(with_weights_of(fresh, build("mha", qkv_bias=bias))(x), fresh(x))
    mixer = build("dha", **options)
    for omega, groups in ((mixer.project.omega_k, (2, 2)), (mixer.project.omega_v, (3, 1))):
        rows = [torch.randn(1, m).expand(m, m).flatten() for m in groups]
        omega.copy_(torch.cat(rows))  # the same weights for every member: they agree
    assert step(mixer, 1, x)["dha/fusion"] < 1e-24
    plain = attnzoo.create("dha", D, H, **{**options, "fusion": False}).double()
    plain.load_state_dict(collapse(mixer))
    same(plain(x), mixer(x))
    assert plain.project.heads == (H, 2, 2)


def test_fusion_ascends_its_multipliers_towards_a_falling_target() -> None:
    mixer, x = build("dha", **FUSION, fusion_steps=4, fusion_rate=0.5).train(), tokens()
    l1, l2, first = 0.0, 0.0, None
    for n in range(6):
        for param in (mixer.project.qkv_proj.weight, mixer.project.omega_k):
            param.add_(0.1 * torch.randn_like(param))
        loss = fused_by_loops(mixer)[2]
        first = loss if first is None else first
        gap = loss - first * max(0.0, 1 - n / 4)
        collector = Collector()
        mixer(x, Context(collector=collector))
        if n:
            same(collector.total(), l1 * gap + l2 * gap**2)
        step(mixer, n + 1, x)
        l1, l2 = l1 + 0.5 * gap, l2 + 0.5 * gap**2
        same(mixer.project.l1, l1)
        same(mixer.project.l2, l2)
    resumed = build("dha", **FUSION, fusion_steps=4)
    resumed.load_state_dict(mixer.state_dict())
    same(resumed.project.target, mixer.project.target)


def test_fusion_draws_heads_together() -> None:
    mixer = attnzoo.create("dha", D, H, **FUSION, fusion_steps=60, fusion_rate=3e4)
    optimiser, x = torch.optim.Adam(mixer.parameters(), 2e-3), torch.randn(4, T, D)
    teacher, losses = attnzoo.create("mha", D, H)(x).detach(), []
    for n in range(120):
        collector = Collector()
        loss = (mixer(x, Context(collector=collector)) - teacher).square().mean() + collector.total()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(collector.steps["dha/fusion"][0]))
        mixer.on_step(n + 1, {"dha/fusion": collector.steps["dha/fusion"][0]}, torch.Generator())
    assert losses[-1] < 0.02 * losses[0]


REFUSED: list[tuple[str, dict[str, Any], str, object]] = [
    ("dha", {"num_key_heads": 0}, "num_key_heads", 0),
    ("dha", {"num_value_heads": 5}, "num_value_heads", 5),
    ("dha", {"num_key_heads": (2, 2)}, "num_key_heads", 2),
    ("dha", {"num_key_heads": 2, "key_map": (0, 1, 2, 0)}, "key_map", 2),
    ("dha", {"num_key_heads": 3, "key_map": (0, 1, 1, 0)}, "key_map", 3),
    ("dha", {"key_map": (0, -1, 1, 0)}, "key_map", -1),
    ("dha", {"value_map": (0, 1, 1)}, "value_map", 3),
    ("dha", {"value_map": ()}, "value_map", 0),
    ("dha", {"value_map": ((0, 0, 0, 0),) * 3}, "value_map", 3),
    ("dha", {"fusion_steps": 0}, "fusion_steps", 0),
    ("dha", {"fusion_rate": -1.0}, "fusion_rate", -1.0),
    ("dha", {"num_kv_heads": 2}, "num_kv_heads", 2),
    ("dha", {"add": ("sqa",)}, "num_kv_heads", 2),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED)
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    refuses(name, options, field, value)


@pytest.mark.parametrize(
    "name, options",
    [
        ("dha", {"add": ("kv_shift", "kha"), "num_key_heads": 3, "window": 4, "n_sink": 1, "qk_norm": True}),
        ("dha", {"add": ("kv_shift", "dcmha"), **FUSION, "output_gate": "elementwise", "qkv_bias": True}),
    ],
)
def test_accepted(name: str, options: dict[str, Any]) -> None:
    accepts(name, options)
