"""Quality against what it costs: one panel per cost, with the frontier and what lies behind it shaded."""

from __future__ import annotations

from itertools import pairwise
from math import log10
from typing import Any

import plotly.graph_objects as go

from attnzoo.compare.page.figures import Plot, Style, figure
from attnzoo.compare.page.labels import place
from attnzoo.compare.page.numbers import byte_ticks, quantity, unit_of

# cost -> the metrics that can stand for it, the first that was measured
COSTS = {
    "FLOPs": ("train_flops",),
    "cache": ("cache_bytes",),
    "time": ("seconds", "tokens_per_second", "decode_ms"),
}
AXIS_UNITS = {"s": " in seconds", "ms/token": " in ms per token", "tokens/s": " in tokens per second"}

Point = tuple[float, float]


def pareto_plots(setting: dict[str, Any], look: dict[str, Style], quality: str, prefix: str) -> list[Plot]:
    """A plot for every cost that was measured and is not the same for all arms."""
    metrics = {metric["key"]: metric for metric in setting["metrics"]}
    found = {(r["arm"], r["metric"]): r for r in setting["results"] if r["mean"] is not None}
    plots = []
    for cost, keys in COSTS.items():
        key = next((key for key in keys if key in metrics), None)
        both = [arm for arm in setting["arms"] if (arm, key) in found and (arm, quality) in found]
        points = {arm: (found[arm, key]["mean"], found[arm, quality]["mean"]) for arm in both}
        if len({x for x, _ in points.values()}) > 1:
            spread = {arm: _ends(found[arm, quality]) for arm in both}
            drawn = _draw(points, look, metrics[key], metrics[quality], spread)
            legend = sum(trace.showlegend for trace in drawn.data)
            height = 340 + 20 * legend  # a line each, in a panel that is narrow on every screen
            plots.append(Plot(f"{prefix}-{cost.lower()}", f"Against {cost}", "", {(): drawn}, height=height))
    return plots


def frontier(points: dict[str, Point], x_better: str, y_better: str) -> list[str]:
    """Arms that no other arm beats in one respect without losing in the other, the cheapest first."""
    sign_x, sign_y = (1 if better == "lower" else -1 for better in (x_better, y_better))
    costs = {arm: (sign_x * x, sign_y * y) for arm, (x, y) in points.items()}

    def beaten(arm: str) -> bool:
        x, y = costs[arm]
        return any(u <= x and v <= y and (u, v) != (x, y) for u, v in costs.values())

    return sorted((arm for arm in points if not beaten(arm)), key=lambda arm: costs[arm])


def _ends(result: dict[str, Any]) -> Point:
    """Lowest and highest seed."""
    values = list(result["values"].values()) or [result["mean"]]
    return min(values), max(values)


def _draw(
    points: dict[str, Point],
    look: dict[str, Style],
    cost: dict[str, Any],
    quality: dict[str, Any],
    spread: dict[str, Point],
) -> go.Figure:
    title = cost["title"] + AXIS_UNITS.get(cost["unit"], "")
    drawn = figure(title, quality["title"], hovermode="closest", showlegend=True)
    logarithmic, xs, ys = _axes(drawn, points, spread, cost)
    if unit_of(quality) == "share":
        drawn.update_yaxes(tickformat=".0%")
    front = frontier(points, cost["better"], quality["better"])
    corners = _corners([points[arm] for arm in front], cost, quality, xs, ys)
    drawn.add_traces(_steps(corners))
    lines = [(min(a, c), min(b, d), max(a, c), max(b, d)) for (a, b), (c, d) in pairwise(corners)]
    lines += [(points[arm][0], low, points[arm][0], high) for arm, (low, high) in spread.items()]
    names = {arm: look[arm].name for arm in points}
    foremost = {arm: points[arm] for arm in [*front, *points]}
    sides = place(foremost, names, lines, logarithmic, xs, ys)
    for arm, point in points.items():
        drawn.add_trace(_marker(look[arm], point, spread[arm], cost, quality, arm in front, sides.get(arm)))
    return drawn


def _axes(
    drawn: go.Figure, points: dict[str, Point], spread: dict[str, Point], cost: dict[str, Any]
) -> tuple[bool, Point, Point]:
    """Ranges with room around the points for their names: (whether x is logarithmic, x range, y range)."""
    costs = [x for x, _ in points.values()]
    low, high = min(low for low, _ in spread.values()), max(high for _, high in spread.values())
    room = 0.16 * (high - low) or 0.01
    logarithmic = min(costs) > 0 and max(costs) / min(costs) > 4
    left, right = (log10(min(costs)), log10(max(costs))) if logarithmic else (min(costs), max(costs))
    side = 0.2 * (right - left)
    shown = [left - side, right + side]
    drawn.update_yaxes(range=[low - room, high + room], nticks=6)
    drawn.update_xaxes(type="log" if logarithmic else "linear", range=shown, tickformat="~s", nticks=5)
    xs = tuple(10**end if logarithmic else end for end in shown)
    if cost["unit"] == "bytes":
        ticks, texts = byte_ticks(*xs, most=4)
        drawn.update_xaxes(tickvals=ticks, ticktext=texts)
    return logarithmic, xs, (low - room, high + room)


def _corners(
    front: list[Point], cost: dict[str, Any], quality: dict[str, Any], xs: Point, ys: Point
) -> list[Point]:
    """The frontier as steps, out to the ends of the axes behind which the other arms lie."""
    corners = [(front[0][0], ys[1] if quality["better"] == "lower" else ys[0])]
    for x, y in front:
        corners += [(x, corners[-1][1]), (x, y)]
    return [*corners, (xs[1] if cost["better"] == "lower" else xs[0], front[-1][1])]


def _steps(corners: list[Point]) -> list[go.Scatter]:
    """What lies behind the frontier, shaded, and the frontier itself."""
    behind = [*corners, (corners[-1][0], corners[0][1])]
    common = {
        "mode": "lines",
        "hoverinfo": "skip",
        "name": "frontier",
        "meta": "frontier",
        "showlegend": False,
    }
    return [
        go.Scatter(
            x=[x for x, _ in behind],
            y=[y for _, y in behind],
            fill="toself",
            fillcolor="var(--raised)",
            line={"width": 0},
            **common,
        ),
        go.Scatter(
            x=[x for x, _ in corners],
            y=[y for _, y in corners],
            line={"color": "var(--frontier)", "width": 2},
            **common,
        ),
    ]


def _marker(
    style: Style,
    point: Point,
    ends: Point,
    cost: dict[str, Any],
    quality: dict[str, Any],
    on_frontier: bool,
    side: str | None,
) -> go.Scatter:
    """An arm's point; its name stands beside it, or in the legend where there is no room."""
    lines = [
        f"<b>{style.name}</b>",
        f"{quality['title']}: {quantity(point[1], unit_of(quality))}",
        f"{cost['title']}: {quantity(point[0], unit_of(cost))}",
        *(["on the frontier"] if on_frontier else []),
    ]
    return go.Scatter(
        x=[point[0]],
        y=[point[1]],
        mode="markers+text",
        name=style.name,
        meta="point",
        text=[style.name if side else ""],
        textposition=side or "top center",
        showlegend=side is None,
        textfont={"size": 12, "color": "var(--ink)"},
        cliponaxis=False,
        marker={
            "color": style.colour,
            "symbol": style.symbol,
            "size": 11,
            "line": {"width": 2 if style.symbol.endswith("open") else 0},
        },
        error_y={
            "type": "data",
            "array": [ends[1] - point[1]],
            "arrayminus": [point[1] - ends[0]],
            "thickness": 1.5,
            "width": 0,
            "color": style.colour,
        },
        hovertemplate="<br>".join(lines) + "<extra></extra>",
    )
