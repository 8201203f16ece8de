"""Quality against what it costs: one panel per cost, the frontier drawn, what lies behind it faded."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from .figures import Plot, Style, figure
from .labels import place
from .numbers import byte_ticks, quantity

# cost -> the metrics that can stand for it, the first that was measured
COSTS = {
    "FLOPs": ("train_flops",),
    "cache": ("cache_bytes",),
    "time": ("seconds", "train_seconds", "tokens_per_second", "decode_ms"),
}


def pareto_plots(setting: dict[str, Any], look: dict[str, Style], quality: str, prefix: str) -> list[Plot]:
    """A plot for every cost that was measured for at least two arms and differs between them."""
    metrics = {metric["key"]: metric for metric in setting["metrics"]}
    means = {(r["arm"], r["metric"]): r["mean"] for r in setting["results"] if r["mean"] is not None}
    plots = []
    for cost, keys in COSTS.items():
        key = next((key for key in keys if key in metrics), None)
        if key is None or quality not in metrics:
            continue
        points = {arm: (means[arm, key], means[arm, quality]) for arm in setting["arms"]
                  if (arm, key) in means and (arm, quality) in means}  # fmt: skip
        if len({x for x, _ in points.values()}) > 1:
            drawn = _draw(points, look, metrics[key], metrics[quality], _spread(setting, quality))
            plots.append(Plot(f"{prefix}-{cost.lower()}", f"Against {metrics[key]['title']}", "", {(): drawn}, height=340))
    return plots


def frontier(points: dict[str, tuple[float, float]], x_better: str, y_better: str) -> list[str]:
    """Arms that no other arm beats in one respect without losing in the other, by rising cost."""
    sign_x, sign_y = (1 if better == "lower" else -1 for better in (x_better, y_better))
    costs = {arm: (sign_x * x, sign_y * y) for arm, (x, y) in points.items()}

    def beaten(arm: str) -> bool:
        x, y = costs[arm]
        return any(u <= x and v <= y and (u, v) != (x, y) for u, v in costs.values())

    return sorted((arm for arm in points if not beaten(arm)), key=lambda arm: costs[arm])


def _spread(setting: dict[str, Any], quality: str) -> dict[str, tuple[float, float]]:
    """Lowest and highest seed of every arm."""
    found = {r["arm"]: list(r["values"].values()) for r in setting["results"] if r["metric"] == quality}
    return {arm: (min(values), max(values)) for arm, values in found.items() if values}


def _draw(points: dict[str, tuple[float, float]], look: dict[str, Style], cost: dict[str, Any],
          quality: dict[str, Any], spread: dict[str, tuple[float, float]]) -> go.Figure:  # fmt: skip
    front = frontier(points, cost["better"], quality["better"])
    xs, ys = [x for x, _ in points.values()], [y for _, y in points.values()]
    wide = min(xs) > 0 and max(xs) / min(xs) > 4
    unit = f" ({cost['unit']})" if cost["unit"] and cost["unit"] != "bytes" else ""
    drawn = figure(cost["title"] + unit, quality["title"], hovermode="closest", showlegend=False)
    drawn.add_trace(
        go.Scatter(
            x=[points[arm][0] for arm in front], y=[points[arm][1] for arm in front], mode="lines", meta="frontier",
            line={"color": "var(--frontier)", "width": 6, "shape": "hv" if cost["better"] == "lower" else "vh"},
            hoverinfo="skip", name="frontier", opacity=0.5,
        )
    )  # fmt: skip
    sides = place(points, {arm: look[arm].name for arm in points}, wide)
    for arm, (x, y) in points.items():
        low, high = spread.get(arm, (y, y))
        text = f"<b>{look[arm].name}</b><br>{quality['title']} {quantity(y, quality['unit'])}" + (
            f"<br>{cost['title']} {quantity(x, cost['unit'])}" + ("<br>on the frontier" if arm in front else "")
        )
        drawn.add_trace(
            go.Scatter(
                x=[x], y=[y], mode="markers+text", name=look[arm].name, text=[look[arm].name], meta="point",
                textposition=sides[arm], textfont={"size": 12, "color": "var(--ink)"}, cliponaxis=False,
                marker={"color": look[arm].colour, "symbol": look[arm].symbol, "size": 11,
                        "opacity": 1 if arm in front else 0.55, "line": {"width": 2 if "open" in look[arm].symbol else 0}},
                error_y={"type": "data", "array": [high - y], "arrayminus": [y - low], "thickness": 1.2, "width": 0,
                         "color": look[arm].colour},
                hovertemplate=text + "<extra></extra>",
            )
        )  # fmt: skip
    _axes(drawn, xs, ys, spread, wide, cost)
    return drawn


def _axes(drawn: go.Figure, xs: list[float], ys: list[float], spread: dict, wide: bool, cost: dict[str, Any]) -> None:
    """Room around the points for their names."""
    from math import log10

    lows, highs = [*ys, *(low for low, _ in spread.values())], [*ys, *(high for _, high in spread.values())]
    room = 0.16 * (max(highs) - min(lows)) or 0.01
    drawn.update_yaxes(range=[min(lows) - room, max(highs) + room], nticks=6)
    left, right = (log10(min(xs)), log10(max(xs))) if wide else (min(xs), max(xs))
    side = 0.22 * (right - left)
    drawn.update_xaxes(type="log" if wide else "linear", range=[left - side, right + side], tickformat="~s", nticks=5)
    if cost["unit"] == "bytes":
        span = (10 ** (left - side), 10 ** (right + side)) if wide else (left - side, right + side)
        ticks, texts = byte_ticks(*span, most=4)
        drawn.update_xaxes(tickvals=ticks, ticktext=texts)
