"""Which parameter goes to which optimiser, Muon and AdamW as one, the schedules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.train.optim import (
    build_optimizer,
    check_named_state,
    load_named_state,
    lr_factor,
    named_state,
    parameter_groups,
    set_learning_rate,
)
from attnzoo.train.settings import OptimSettings

ADAMW, MUON = OptimSettings(name="adamw"), OptimSettings(name="muon")


class Toy(nn.Module):
    """A stand-in with every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 8, bias=False)])
        self.blocks[0].conv = nn.Parameter(torch.randn(6, 1, 4))
        self.blocks[0].table = nn.Parameter(torch.randn(3, 4))
        self.blocks[0].table.no_weight_decay = True
        self.blocks[1].gain = nn.Parameter(torch.ones(8))
        self.blocks[1].gain.lr_scale = 3.0
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.blocks[0](self.embed(x)) * self.blocks[0].conv.mean() + self.blocks[0].table.sum()
        return self.head(self.blocks[1](hidden) * self.blocks[1].gain)


def names_of(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


@pytest.mark.parametrize("settings", [ADAMW, MUON], ids=lambda s: s.name)
@pytest.mark.parametrize("layout", [*attnzoo.list_variants(), "gated_deltanet*3,mha"])
def test_every_parameter_is_in_exactly_one_group(layout: str, settings: OptimSettings) -> None:
    for tie_head in (False, True):
        with torch.device("meta"):
            model = attnzoo.create_model(layout, dim=32, depth=4, num_heads=4, tie_head=tie_head)
        grouped = [id(p) for group in build_optimizer(model, settings).param_groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_muon_takes_the_hidden_matrices_and_nothing_else() -> None:
    groups = names_of(model := Toy(), parameter_groups(model, MUON))
    by_muon = {name for name, group in groups.items() if group["kind"] == "muon"}
    assert by_muon == {"blocks.0.weight", "blocks.1.weight"}
    with torch.device("meta"):
        model = attnzoo.create_model("gated_deltanet", dim=32, depth=1, num_heads=4)
    for name, group in names_of(model, parameter_groups(model, MUON)).items():
        p = model.get_parameter(name)
        hidden = name.startswith("blocks.") and p.ndim == 2 and not getattr(p, "no_weight_decay", False)
        assert (group["kind"] == "muon") == hidden, name


@pytest.mark.parametrize("settings", [ADAMW, MUON], ids=lambda s: s.name)
def test_parameters_bring_their_own_decay_and_learning_rate(settings: OptimSettings) -> None:
    groups = names_of(model := Toy(), parameter_groups(model, settings))
    undecayed = {name for name, group in groups.items() if group["weight_decay"] == 0.0}
    assert undecayed == {"blocks.0.bias", "blocks.0.table", "blocks.1.gain"}
    scales = {name: group["base_lr"] / settings.lr for name, group in groups.items()}
    assert scales.pop("blocks.1.gain") == pytest.approx(3.0) and set(scales.values()) == {1.0}


def twins() -> tuple[Toy, Toy]:
    """Two models with the same weights; a deep copy would lose what parameters ask of the optimiser."""
    one, two = Toy(), Toy()
    two.load_state_dict(one.state_dict())
    return one, two


def steps(model: nn.Module, optimizers: list[torch.optim.Optimizer], count: int, start: int = 0) -> None:
    for step in range(start, start + count):
        torch.manual_seed(step)
        x = torch.randint(11, (4, 5))
        for optimizer in optimizers:
            set_learning_rate(optimizer, 1 / (1 + step))
            optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()


def test_the_one_optimiser_equals_torchs_two() -> None:
    one, two = twins()
    groups = parameter_groups(two, MUON)
    separate = [
        torch.optim.Muon(
            [g for g in groups if g["kind"] == "muon"], momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([g for g in groups if g["kind"] == "adamw"], betas=(0.9, 0.95)),
    ]
    before = [p.clone() for p in one.parameters()]
    steps(one, [build_optimizer(one, MUON)], 3)
    steps(two, separate, 3)
    for p, q, start in zip(one.parameters(), two.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert not torch.equal(p, start)


@pytest.mark.parametrize("settings", [ADAMW, MUON], ids=lambda s: s.name)
@pytest.mark.parametrize("named", [False, True])
def test_state_comes_back(settings: OptimSettings, named: bool) -> None:
    straight, broken = twins()
    steps(straight, [build_optimizer(straight, settings)], 5)
    first = build_optimizer(broken, settings)
    steps(broken, [first], 3)
    second = build_optimizer(broken, settings)
    if named:
        state = copy.deepcopy(named_state(broken, first))
        check_named_state(broken, settings, state)
        load_named_state(broken, second, state)
    else:
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(broken, [second], 2, start=3)
    for p, q in zip(straight.parameters(), broken.parameters(), strict=True):
        assert torch.equal(p, q)


def test_state_of_another_optimiser_is_refused() -> None:
    steps(model := Toy(), [optimizer := build_optimizer(model, ADAMW)], 1)
    with pytest.raises(ValueError, match=r"optim\.name: .*'blocks\.0\.weight'.*init_from"):
        check_named_state(model, MUON, named_state(model, optimizer))


@pytest.mark.parametrize(
    ("options", "points"),
    [
        ({"schedule": "cosine", "warmup": 0.1, "final": 0.1}, {0: 0.1, 4: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        (
            {"schedule": "wsd", "warmup": 0.1, "decay": 0.2, "final": 0.0},
            {4: 0.5, 10: 1.0, 80: 1.0, 90: 0.5, 100: 0.0},
        ),
        ({"schedule": "constant", "warmup": 0.1}, {0: 0.1, 10: 1.0, 99: 1.0}),
        ({"schedule": "cosine", "warmup": 0.0, "final": 0.0}, {0: 1.0, 50: 0.5}),
    ],
)
def test_schedules_pass_through_their_points(options: dict, points: dict[int, float]) -> None:
    for step, factor in points.items():
        assert lr_factor(OptimSettings(**options), step, 100) == pytest.approx(factor), step


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 20])
def test_schedules_are_sound_at_any_length(schedule: str, total: int) -> None:
    factors = [lr_factor(OptimSettings(schedule=schedule), step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors) and max(factors) > 0.5
    peak = factors.index(max(factors))
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
