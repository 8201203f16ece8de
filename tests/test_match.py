"""Equal budgets, against enumeration of what could have been chosen and models that are really built."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import yaml

from attnzoo import create_model, list_variants
from attnzoo.cli.train import config_folder
from attnzoo.match import budget_of, solve
from attnzoo.model.block import default_hidden
from attnzoo.train.objective import objective_of

T, VOCAB = 256, 256
SOME = (
    "cla",
    "discrete_kv_bottleneck",
    "efficient_dlm",
    "gated_deltanet",
    "hymba",
    "linformer",
    "log_linear",
    "masa",
    "mla",
    "mqa",
    "spectformer",
    "sqa",
)


def config(attention: str = "mha", seq_len: int = T, **model: Any) -> dict[str, Any]:
    """The nano model, of which no length goes beyond ``seq_len``."""
    nano = yaml.safe_load((config_folder() / "model" / "nano.yaml").read_text())
    nano |= {"norm_eps": 1e-6, "max_seq_len": seq_len, **model}
    return {"attention": {"name": attention}, "model": nano, "data": {"seq_len": seq_len}}


def small(attention: str = "mha", **model: Any) -> dict[str, Any]:
    return config(attention, seq_len=32, **{"dim": 32, "depth": 2, "num_heads": 4, **model})


def built(settings: dict[str, Any], device: str = "cpu") -> torch.nn.Module:
    model, attention = dict(settings["model"]), dict(settings["attention"])
    layout = model.pop("layout") or attention["name"]
    attention.pop("name")
    with torch.device(device):
        return create_model(layout, VOCAB, **model, **attention)


def spent(settings: dict[str, Any], budget: str, device: str = "cpu") -> float:
    """What a built model really has: counted weights, bytes of a built cache, FLOPs of its objective."""
    model, length = built(settings, device), settings["data"]["seq_len"]
    if budget == "params":
        return sum(p.numel() for p in model.parameters())
    if budget == "cache":
        return model.new_cache(1, length, dtype=torch.bfloat16).nbytes
    return objective_of(model).train_flops(model, length)[0]


@pytest.mark.parametrize("name", ["mha", "gqa", "mla", "linear", "sliding_window", "efficient_dlm"])
@pytest.mark.parametrize("budget", ["params", "train_flops", "cache"])
def test_a_budget_is_what_the_built_model_spends(name: str, budget: str) -> None:
    # each layer's cache is rounded up to whole bytes
    assert budget_of(config(name), budget, VOCAB) == pytest.approx(spent(config(name), budget), abs=6)


def test_flops_of_attention_and_of_two_copies() -> None:
    dim, hidden, depth = 128, default_hidden(128), 6
    layers = depth * (2 * (4 * dim**2 + 3 * dim * hidden) + 4 * dim * (T + 1) / 2)
    assert budget_of(config(), "train_flops", VOCAB) == 3 * (layers + 2 * dim * VOCAB)
    once = budget_of(config(), "train_flops", VOCAB)
    both = budget_of(config("efficient_dlm"), "train_flops", VOCAB)
    # both copies pass the layers, one passes the head; a block sees the whole of itself
    assert 2 * once - 3 * 2 * dim * VOCAB < both < 2.02 * once


def check_matched(name: str, budget: str) -> None:
    reference, own = config(), config(name)
    target, before = budget_of(reference, budget, VOCAB), copy.deepcopy(own)
    matched = solve(own, budget, target, VOCAB)
    changed = matched.apply(own)
    value = spent(changed, budget)
    assert value == pytest.approx(matched.value)
    assert abs(value / target - 1) <= 0.01
    assert matched.deviation == pytest.approx(matched.value / target - 1)
    assert own == before, "the given configuration was changed"
    assert set(matched.before) == set(matched.changes) <= {"model.mlp_hidden", "model.dim"}
    for key, value in matched.changes.items():
        assert changed["model"][key.partition(".")[2]] == value != matched.before[key]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("budget", ["params", "train_flops"])
def test_some_variants_meet_the_budget_of_attention(name: str, budget: str) -> None:
    check_matched(name, budget)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_variants())
@pytest.mark.parametrize("budget", ["params", "train_flops"])
def test_every_variant_meets_the_budget_of_attention(name: str, budget: str) -> None:
    check_matched(name, budget)


@pytest.mark.parametrize("budget", ["params", "train_flops", "cache"])
def test_what_is_equal_stays_as_it_is(budget: str) -> None:
    matched = solve(config(), budget, budget_of(config(), budget, VOCAB), VOCAB, tolerance=0.0)
    assert matched.changes == {} and matched.deviation == 0
    assert matched.apply(config()) == config()
    # once solved, solving again changes nothing
    target = budget_of(config(), "params", VOCAB)
    changed = solve(config("gqa"), "params", target, VOCAB).apply(config("gqa"))
    assert solve(changed, "params", target, VOCAB).changes == {}


BASE = {"mlp_hidden": 16, "dim": 32, "num_heads": 4, "depth": 2}


def enumerated(own: dict[str, Any], knob: str, budget: str) -> dict[int, float]:
    """What every value of a knob spends, without the code under test."""
    spends: dict[int, float] = {}
    step = 8 if knob == "dim" else 1
    for n in range(max(step, BASE[knob] // 8), 8 * BASE[knob] + 1, step):
        settings = copy.deepcopy(own)
        settings["model"][knob] = n
        if knob == "num_heads":
            settings["attention"]["head_dim"] = 8
        try:
            spends[n] = spent(settings, budget, "meta")
        except ValueError:
            continue
    return spends


@pytest.mark.parametrize(
    ("name", "knob", "budget"),
    [
        ("mha", "mlp_hidden", "params"),
        ("moh", "mlp_hidden", "train_flops"),
        ("gqa", "dim", "params"),
        ("rwkv7", "dim", "params"),
        ("linear", "dim", "cache"),
        ("mla", "dim", "train_flops"),
        ("gqa", "num_heads", "cache"),
        ("dgqa", "num_heads", "params"),
        ("linear", "num_heads", "cache"),
        ("mixattention", "depth", "cache"),
        ("cla", "depth", "params"),
    ],
)
def test_the_nearest_of_all_values_is_found(name: str, knob: str, budget: str) -> None:
    own = small(name, **{knob: BASE[knob]})
    spends = enumerated(own, knob, budget)
    now = spent(own, budget, "meta")
    values = sorted(set(spends.values()))
    assert len(values) > 3
    few = 9 if knob == "num_heads" else 3
    for value in values[:: -(-len(values) // few)]:
        matched = solve(own, budget, value, VOCAB, by=knob, tolerance=1e-12)
        assert matched.value == value
        assert matched.changes == {} if value == now else spends[matched.changes[f"model.{knob}"]] == value
    # between two values, and beyond the end
    for target in (values[0] * 0.7 + values[1] * 0.3, values[-1] * 1.5):
        best = min(values, key=lambda v: abs(v - target))
        off = abs(best / target - 1)
        with pytest.raises(ValueError, match=re.escape(f"{name} cannot meet {target:,.0f}")) as error:
            solve(own, budget, target, VOCAB, by=knob, tolerance=0.999 * off)
        assert f"the nearest is {best:,.0f}, " in str(error.value)
        assert f"match.tolerance={off:.3f}"[:-1] in str(error.value)
    assert solve(own, budget, target, VOCAB, by=knob, tolerance=1.001 * off).value == best


def test_the_least_invasive_knob_that_suffices_is_taken() -> None:
    def keys(target: float) -> set[str]:
        return {*solve(config(), "params", target, VOCAB, tolerance=0.001).changes}

    # a wider stream would meet the first as well, but the MLP alone goes from half to double
    assert keys(spent(config(dim=136), "params")) == {"model.mlp_hidden"}
    assert keys(spent(config(dim=256), "params")) == {"model.dim"}
    # steps of dim alone are too coarse
    assert keys(3.1 * spent(config(), "params")) == {"model.dim", "model.mlp_hidden"}
    narrow = small(mlp_hidden=1)
    assert solve(narrow, "params", budget_of(narrow, "params", VOCAB), VOCAB, by="depth").changes == {}


@pytest.mark.parametrize(
    ("name", "width"), [("gqa", 8), ("cca", 4), ("gated_deltanet", 6), ("fixed_head_size", 64)]
)
def test_added_heads_are_as_wide_as_the_others(name: str, width: int) -> None:
    """cca and gated_deltanet choose another width than dim / num_heads where they are told none."""
    target = 2 * budget_of(small(name), "cache", VOCAB)
    matched = solve(small(name), "cache", target, VOCAB, by="num_heads", tolerance=0.1)
    assert matched.changes == {"model.num_heads": 8, "attention.head_dim": width}
    assert matched.before == {"model.num_heads": 4, "attention.head_dim": width}


def test_heads_without_a_width_of_their_own_widen_the_stream() -> None:
    target = 2 * budget_of(small("hgrn2"), "cache", VOCAB)
    matched = solve(small("hgrn2"), "cache", target, VOCAB, by="num_heads")
    assert matched.changes == {"model.num_heads": 8, "model.dim": 64}


def test_a_head_width_that_is_set_stays() -> None:
    own = small("gqa")
    own["attention"]["head_dim"] = 20
    matched = solve(own, "cache", 2 * budget_of(own, "cache", VOCAB), VOCAB)
    assert matched.changes == {"model.num_heads": 8}


def test_state_that_does_not_grow_is_matched_by_heads_or_not_at_all() -> None:
    target = budget_of(config(), "cache", VOCAB)
    matched = solve(config("deltanet"), "cache", target, VOCAB)
    assert "model.num_heads" in matched.changes
    assert abs(spent(matched.apply(config("deltanet")), "cache") / target - 1) <= 0.01
    # the state of grassmann is a ring of rank x window: only layers add to it, up to four times
    most = spent(config("grassmann", depth=24), "cache")
    with pytest.raises(ValueError, match="grassmann cannot meet") as error:
        solve(config("grassmann"), "cache", target, VOCAB)
    message = str(error.value)
    assert "\n" not in message
    assert (
        f"{target:,.0f} bytes of cache within 1 %; the nearest is {most:,.0f}, model.depth 6 -> 24" in message
    )
    assert "match.tolerance=" in message and "another budget" in message
    with pytest.raises(ValueError, match=r"as it is .* set match.by \(auto, dim, num_heads, depth\)"):
        solve(config("grassmann"), "cache", target, VOCAB, by="mlp_hidden")


def test_layouts_say_how_deep_a_model_may_be() -> None:
    listed = small(layout=["gated_deltanet", {"name": "mha", "window": 8}])
    for value in (1.5, 0.7):
        target = value * budget_of(listed, "params", VOCAB)
        with pytest.raises(ValueError, match=r"cannot meet .* as it is"):
            solve(listed, "params", target, VOCAB, by="depth")
        assert "model.depth" not in solve(listed, "params", target, VOCAB).changes
    pattern = small(layout="gated_deltanet*3,mha", depth=8)
    least = budget_of(small(layout="gated_deltanet*3,mha", depth=4), "params", VOCAB)
    assert solve(pattern, "params", least, VOCAB, by="depth").changes == {"model.depth": 4}
    with pytest.raises(ValueError, match=r"model\.depth 8 -> 4"):
        solve(pattern, "params", 0.8 * least, VOCAB, by="depth")


def test_nothing_is_drawn() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    solve(small("gqa"), "params", budget_of(small(), "params", VOCAB), VOCAB)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": "flops"}, "match: no budget 'flops'; did you mean train_flops?"),
        ({"by": "width"}, "match.by: no knob 'width'; "),
        ({"by": "mlp_hiden"}, "did you mean mlp_hidden?"),
        ({"tolerance": -0.1}, "match.tolerance: must be a number of at least 0"),
        ({"target": 0}, "match: the reference holds no parameters, got 0"),
        ({"config": small("gqa", num_heads=5)}, "dim: must be divisible by num_heads=5"),
        ({"config": small("gqaa")}, "variant: 'gqaa' is none of the zoo"),
    ],
)
def test_mistakes_are_said(change: dict[str, Any], message: str) -> None:
    arguments = {"config": small("gqa"), "budget": "params", "target": 1e5, "vocab_size": VOCAB} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        solve(**arguments)
