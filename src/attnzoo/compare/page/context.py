"""What the context brings and what it costs: loss by position, decode latency and cache against context."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from .curves import area
from .figures import Plot, Style, figure
from .numbers import byte_ticks, quantity


def positions_plot(
    setting: dict[str, Any], look: dict[str, Style], baseline: str | None, id: str
) -> Plot | None:
    """Loss by position in the context, and minus the baseline's; None where no arm has it."""
    rows = {row["arm"]: row for row in setting["positions"] if row["mean"]}
    if not rows:
        return None
    figures = {
        ("loss",): _positions(
            {arm: row["loss"] for arm, row in rows.items()}, rows, look, "validation loss in nats"
        )
    }
    base = rows.get(baseline)
    if base and len(rows) > 1:
        gaps = {
            arm: {
                seed: [a - b for a, b in zip(loss, base["loss"][seed], strict=True)]
                for seed, loss in row["loss"].items()
                if seed in base["loss"]
            }
            for arm, row in rows.items()
            if row["edges"] == base["edges"]
        }
        figures[f"loss − {baseline}",] = _positions(gaps, rows, look, "difference in nats")
    caption = "Validation loss in nats, by how many tokens stand before. A falling curve uses its context."
    return Plot(id, "Loss by position", caption, figures, {"Show": [key[0] for key in figures]}, height=380)


def _positions(
    losses: dict[str, dict[str, list[float]]], rows: dict[str, Any], look: dict[str, Style], title: str
) -> go.Figure:
    drawn = figure("position in the context", title, hovermode="x unified")
    names: list[str] = []
    means = {}
    for arm, seeds in losses.items():
        values = list(zip(*seeds.values(), strict=True))
        if not values:
            continue
        edges = rows[arm]["edges"]
        names = [str(a) if b == a + 1 else f"{a}–{b - 1}" for a, b in pairwise(edges)]
        means[arm] = (names, [sum(column) / len(column) for column in values])
        if len(seeds) > 1:
            low, high = [min(column) for column in values], [max(column) for column in values]
            drawn.add_trace(area(names, low, high, look[arm], look[arm].name))
    for arm, (x, mean) in means.items():
        style = look[arm]
        drawn.add_trace(
            go.Scatter(
                x=x,
                y=mean,
                mode="lines+markers",
                line=style.line,
                name=style.name,
                legendgroup=style.name,
                marker={"symbol": style.symbol, "size": 7, "color": style.colour},
                meta="line",
                hovertemplate="%{y:.4f} nats",
            )
        )
    drawn.update_xaxes(type="category", showgrid=False, tickmode="auto", nticks=0)
    return drawn


def decode_plots(setting: dict[str, Any], look: dict[str, Style], prefix: str) -> list[Plot]:
    """Milliseconds per token and bytes of cache against the context; what was not measured is left out."""
    kinds = {
        "ms_per_token": ("Decode latency", "ms per token", "ms", "One sequence, token by token."),
        "cache_bytes": ("Cache growth", "cache of one sequence", "bytes", "What decoding has to keep."),
    }
    plots = []
    for key, (title, axis, unit, caption) in kinds.items():
        rows = [row for row in setting["decode"] if row["context"] and row.get(key)]
        if rows:
            id = f"{prefix}-{key.split('_')[0]}"
            plots.append(Plot(id, title, caption, {(): _growth(rows, look, key, axis, unit)}, height=360))
    return plots


def _growth(rows: list[dict[str, Any]], look: dict[str, Style], key: str, axis: str, unit: str) -> go.Figure:
    drawn = figure("context in tokens", axis, hovermode="x unified")
    for row in rows:
        style = look[row["arm"]]
        drawn.add_trace(
            go.Scatter(
                x=row["context"],
                y=row[key],
                mode="lines+markers",
                line=style.line,
                name=style.name,
                meta="line",
                marker={"symbol": style.symbol, "size": 8, "color": style.colour},
                customdata=[quantity(value, unit) for value in row[key]],
                hovertemplate="%{customdata}",
            )
        )
    contexts = sorted({context for row in rows for context in row["context"]})
    drawn.update_xaxes(
        type="log", tickvals=contexts, ticktext=[f"{context:,}".replace(",", " ") for context in contexts]
    )
    values = [value for row in rows for value in row[key] if value]
    if unit == "bytes" and values:
        ticks, texts = byte_ticks(min(values), max(values))
        drawn.update_yaxes(type="log", tickvals=ticks, ticktext=texts)
    else:
        drawn.update_yaxes(rangemode="tozero")
    return drawn
