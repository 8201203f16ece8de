"""The parts of the report page: numbers, bands over seeds, frontiers, and where names and intervals go."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("attnzoo.compare.page", reason="plotly is not installed")

from attnzoo.compare.page import HERE
from attnzoo.compare.page.curves import band, gap
from attnzoo.compare.page.figures import COLOURS
from attnzoo.compare.page.labels import SIDES, place
from attnzoo.compare.page.numbers import byte_ticks, percent, quantity
from attnzoo.compare.page.pareto import frontier
from attnzoo.compare.page.profile import TURN
from attnzoo.compare.page.tables import FOREST, forest


@pytest.mark.parametrize(
    ("value", "unit", "told"),
    [
        (None, "bytes", "–"), (float("nan"), "s", "–"), (0, "bytes", "0 B"), (2_202_010, "bytes", "2.10 MiB"),
        (1023.9, "bytes", "1.00 KiB"), (10_652_160, "", "10.65 M"), (999_999, "", "1.00 M"), (12, "", "12"),
        (4.2, "ms/token", "4.20 ms"), (4200, "ms/token", "4.20 s"), (410, "s", "6 min 50 s"),
        (9000, "s", "2.50 h"), (119.97, "s", "2 min 00 s"),
        (1.91234, "bits/byte", "1.9123"), (0.9731, "share", "97.3 %"),
    ],
)  # fmt: skip
def test_numbers_for_people(value, unit, told):
    assert quantity(value, unit) == told
    if value and told != "–" and unit != "share":
        assert quantity(value, unit, signed=True) == f"+{told}" and quantity(-value, unit) == f"−{told}"


def test_differences_of_shares_are_percentage_points():
    assert quantity(0.012, "share", signed=True) == "+1.2 pp"


def test_what_rounds_to_nothing_has_no_sign():
    assert quantity(-1e-9, "bits/byte", signed=True) == "0.0000"
    assert percent(0.991) == "−0.90 %" and percent(1.2) == "+20.0 %" and percent(None) == ""


def test_byte_ticks_cover_the_range():
    for low, high in ((3000, 5_000_000), (1, 3), (192 * 1024, 3 * 1024**2)):
        ticks, texts = byte_ticks(low, high, most=4)
        assert ticks[0] <= low and 2 * ticks[-1] * (ticks[1] / ticks[0]) > high and len(ticks) <= 6
        assert len(texts) == len(ticks) == len(set(texts))


@pytest.mark.parametrize("x_better", ["lower", "higher"])
def test_the_frontier_is_what_nothing_beats(x_better):
    """Against a frontier swept from the cheapest point on."""
    chance = random.Random(3)
    for _ in range(50):
        points = {str(i): (chance.randrange(6), chance.randrange(6)) for i in range(7)}
        sign = 1 if x_better == "lower" else -1
        swept, best = set(), float("inf")
        for x in sorted({x for x, _ in points.values()}, key=lambda x: sign * x):
            lowest = min(y for u, y in points.values() if u == x)
            if lowest < best:
                swept |= {arm for arm, point in points.items() if point == (x, lowest)}
                best = lowest
        assert set(frontier(points, x_better, "lower")) == swept


def test_names_avoid_one_another():
    """Two points side by side: the names go apart; alone, a name takes the first side."""
    assert place({"a": (5, 5)}, {"a": "name"}, [], False, (0, 10), (0, 10)) == {"a": SIDES[0]}
    both = place({"a": (5, 5), "b": (5.8, 5)}, {"a": "name", "b": "name"}, [], False, (0, 10), (0, 10))
    assert both["a"] != "middle right"
    crowd = {str(i): (5, 5) for i in range(20)}
    placed = place(crowd, dict.fromkeys(crowd, "a long name"), [], False, (0, 10), (0, 10))
    assert list(placed) == [str(i) for i in range(len(placed))], "the foremost keep their names"
    assert 1 < len(placed) < 10 and len(set(placed.values())) == len(placed)
    at_the_edge = place({"a": (9.9, 5)}, {"a": "name"}, [], False, (0, 10), (0, 10))
    assert at_the_edge == {"a": "middle left"}


def curve(seed: int, tokens: list[int], loss: list[float | None], speed: float = 1.0) -> dict[str, Any]:
    return {
        "arm": "a",
        "seed": seed,
        "tokens": tokens,
        "flops": [2.0 * t for t in tokens],
        "seconds": [t / speed for t in tokens],
        "train_loss": loss,
        "val_tokens": tokens,
        "val": loss,
    }


def test_a_band_is_over_the_seeds_as_far_as_all_have_come():
    curves = [curve(1, [10, 20, 30], [3.0, 2.0, 1.0]), curve(2, [10, 20, 40], [5.0, None, 2.0], speed=2.0)]
    found = band(curves, "a", "training", "FLOPs")
    assert found.seeds == (1, 2) and found.x.tolist() == [20, 40, 60]
    assert found.y.tolist() == [[3, 2, 1], [5, 4, 3]], "a gap is bridged, a longer run is cut"
    assert band(curves, "a", "training", "seconds").x.tolist() == [7.5, 15, 22.5]
    assert band(curves, "b", "training", "tokens") is None
    lonely = [curve(1, [10], [3.0]) | {"flops": [None]}]
    assert band(lonely, "a", "validation", "FLOPs") is None


def test_a_gap_is_paired_by_seed_where_both_are():
    base = band([curve(1, [10, 30], [3.0, 1.0]), curve(2, [10, 30], [4.0, 2.0])], "a", "training", "tokens")
    own = band([curve(s, [20, 30, 40], loss) for s, loss in ((3, [9.0] * 3), (2, [2.5, 1.0, 1.0]))],
               "a", "training", "tokens")  # fmt: skip
    found = gap(own, base)
    assert found.seeds == (2,) and found.x.tolist() == [20, 30]
    np.testing.assert_allclose(found.y, [[2.5 - 3.0, 1.0 - 2.0]])


def test_intervals_are_drawn_on_one_scale():
    results = [
        {"difference": d, "low": d - w, "high": d + w, "verdict": ""} for d, w in ((-2.0, 1.0), (1.0, 0.5))
    ]
    first, second = (cell.mark for cell in forest(results))
    assert first["zero"] == second["zero"]
    assert all(0 <= mark[end] <= FOREST for mark in (first, second) for end in ("zero", "low", "high"))
    scale = (first["high"] - first["low"]) / 2
    for mark, result in ((first, results[0]), (second, results[1])):
        assert mark["at"] - mark["zero"] == pytest.approx(result["difference"] * scale, abs=0.2)
        assert mark["high"] - mark["low"] == pytest.approx((result["high"] - result["low"]) * scale, abs=0.2)


def luminance(colour: str) -> float:
    """As WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_the_palette_can_be_seen(theme):
    """Arms stand 3:1 off their ground, and the numbers of the heat map 4.5:1 off every colour it can have."""
    css = (HERE / "assets" / "colours.css").read_text()
    pairs = re.findall(r"--([\w-]+): (?:light-dark\((#\w{6}), (#\w{6})\)|(#\w{6}))", css)
    colours = {name: (light or both, dark or both)[theme] for name, light, dark, both in pairs}
    arms = [name for name in colours if name.startswith("arm-")]
    assert len(arms) == COLOURS + 1
    assert min(contrast(luminance(colours[arm]), luminance(colours["ground"])) for arm in arms) >= 3

    stops = [(0, "heat-0"), (TURN / 2, "heat-1"), (TURN, "heat-2"), (100, "heat-3")]
    rgb = np.array([[int(colours[name][i : i + 2], 16) for i in (1, 3, 5)] for _, name in stops])
    for value in range(101):
        mixed = [round(np.interp(value, [at for at, _ in stops], rgb[:, channel])) for channel in range(3)]
        ink = luminance(colours[f"heat-ink-{int(value > TURN)}"])
        assert contrast(luminance("#{:02x}{:02x}{:02x}".format(*mixed)), ink) >= 4.5, value
