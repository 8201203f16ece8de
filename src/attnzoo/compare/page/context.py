"""What the context brings and what it costs: loss by position, decode latency and cache against context."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go

from attnzoo.compare.page.curves import area
from attnzoo.compare.page.figures import Plot, Style, figure
from attnzoo.compare.page.numbers import byte_ticks, grouped, quantity


def positions_plot(
    setting: dict[str, Any], look: dict[str, Style], baseline: str | None, id: str
) -> Plot | None:
    """Loss by position in the context, and minus the baseline's; None where no arm has it."""
    rows = {row["arm"]: row for row in setting["positions"] if row["loss"]}
    if not rows:
        return None
    losses = {arm: _by_seed(row) for arm, row in rows.items()}
    figures = {("loss",): _positions(losses, rows, look, "validation loss in nats")}
    if baseline in rows and len(rows) > 1:
        alike = [arm for arm, row in rows.items() if row["edges"] == rows[baseline]["edges"]]
        gaps = {arm: _minus(losses[arm], losses[baseline]) for arm in alike}
        figures[f"loss − {baseline}",] = _positions(gaps, rows, look, "difference in nats")
    caption = "Validation loss in nats, by how many tokens stand before. A falling curve uses its context."
    return Plot(id, "Loss by position", caption, figures, {"Show": [key[0] for key in figures]}, height=380)


def _by_seed(row: dict[str, Any]) -> dict[str, np.ndarray]:
    return {seed: np.array(loss, dtype=float) for seed, loss in row["loss"].items()}  # None becomes nan


def _minus(own: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {seed: loss - base[seed] for seed, loss in own.items() if seed in base}


def _positions(
    losses: dict[str, dict[str, np.ndarray]], rows: dict[str, Any], look: dict[str, Style], title: str
) -> go.Figure:
    drawn = figure("position in the context", title, hovermode="x unified")
    lines = []
    for arm, seeds in losses.items():
        if not seeds:
            continue
        style, values = look[arm], np.array(list(seeds.values()))
        buckets = [str(a) if b == a + 1 else f"{a}–{b - 1}" for a, b in pairwise(rows[arm]["edges"])]
        measured = np.isfinite(values).all(axis=0)
        names, values = (
            [name for name, has in zip(buckets, measured, strict=True) if has],
            values[:, measured],
        )
        if len(seeds) > 1:
            drawn.add_trace(area(names, values.min(0).tolist(), values.max(0).tolist(), style))
        lines.append(_line(style, names, values.mean(0).tolist(), hovertemplate="%{y:.4f} nats"))
    drawn.add_traces(lines)
    drawn.update_xaxes(type="category", showgrid=False, tickmode="auto", nticks=0, autotickangles=[0, -60])
    return drawn


def _line(style: Style, x: list[Any], y: list[float | None], **hover: Any) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        mode="lines+markers",
        line=style.line,
        marker={"symbol": style.symbol, "size": 7, "color": style.colour},
        name=style.name,
        legendgroup=style.name,
        meta="line",
        **hover,
    )


def decode_plots(setting: dict[str, Any], look: dict[str, Style], prefix: str) -> list[Plot]:
    """Milliseconds per token and bytes of cache against the context; what was not measured is left out."""
    kinds = {
        "ms_per_token": ("Decode latency", "ms per token", "ms", "One sequence, token by token."),
        "cache_bytes": ("Cache growth", "cache of one sequence", "bytes", "What decoding has to keep."),
    }
    plots = []
    for key, (title, axis, unit, caption) in kinds.items():
        rows = [row for row in setting["decode"] if any(value is not None for value in row[key])]
        if rows:
            id = f"{prefix}-{key.split('_')[0]}"
            plots.append(Plot(id, title, caption, {(): _growth(rows, look, key, axis, unit)}, height=360))
    return plots


def _growth(rows: list[dict[str, Any]], look: dict[str, Style], key: str, axis: str, unit: str) -> go.Figure:
    drawn = figure("context in tokens", axis, hovermode="x unified")
    for row in rows:
        told = [quantity(value, unit) for value in row[key]]
        line = _line(
            look[row["arm"]], row["context"], row[key], customdata=told, hovertemplate="%{customdata}"
        )
        drawn.add_trace(line)
    contexts = sorted({context for row in rows for context in row["context"]})
    drawn.update_xaxes(type="log", tickvals=contexts, ticktext=[grouped(context) for context in contexts])
    values = [value for row in rows for value in row[key] if value]
    if unit == "bytes" and values:
        ticks, texts = byte_ticks(min(values), max(values))
        drawn.update_yaxes(type="log", tickvals=ticks, ticktext=texts)
    else:
        drawn.update_yaxes(rangemode="tozero")
    return drawn
