"""Loss curves: means over seeds with the range of the seeds behind, against tokens, FLOPs or seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from attnzoo.compare.page.figures import Plot, Style, figure

# name on the page -> (key of the curve, title of the axis, unit behind a value)
AXES = {
    "tokens": ("tokens", "tokens", "tokens"),
    "FLOPs": ("flops", "training FLOPs", "FLOPs"),
    "seconds": ("seconds", "seconds of training", "s"),
}
KINDS = {"validation": ("val_tokens", "val"), "training": ("tokens", "train_loss")}
SETTLED = 0.1  # of the run: before it the loss falls so far that nothing else could be seen
FEW = 30  # points that are marked one by one
BLOCKS = 200  # points of a curve at most; more are averaged


@dataclass(frozen=True)
class Band:
    """Curves of one arm on one x axis: per seed, as rows of ``y``; ``x`` is the mean over the seeds."""

    x: np.ndarray
    y: np.ndarray
    seeds: tuple[int, ...]


def curves_plot(
    setting: dict[str, Any], look: dict[str, Style], baseline: str | None, id: str
) -> Plot | None:
    """The plot of a setting's curves, or None where it has none."""
    figures: dict[tuple[str, ...], go.Figure] = {}
    for kind in KINDS:
        for axis in AXES:
            bands = {label: band(setting["curves"], label, kind, axis) for label in look}
            bands = {label: found for label, found in bands.items() if found is not None}
            if all(len(found.x) < 2 for found in bands.values()):
                continue  # what was measured once, at the end, stands in the table
            title = _title(setting, kind)
            figures[kind, axis] = _draw(bands, look, title, axis)
            if kind == "validation" and baseline in bands and len(bands) > 1:
                gaps = {label: gap(found, bands[baseline]) for label, found in bands.items()}
                gaps = {label: found for label, found in gaps.items() if found is not None}
                figures[f"validation − {baseline}", axis] = _draw(gaps, look, f"difference in {title}", axis)
    if not figures:
        return None
    choices = {
        "Loss": list(dict.fromkeys(key[0] for key in figures)),
        "Against": list(dict.fromkeys(key[1] for key in figures)),
    }
    several = len({curve["seed"] for curve in setting["curves"]}) > 1
    seeds = "Lines are means over seeds; bands reach from the lowest to the highest seed." if several else ""
    caption = f"{seeds} The first tenth of the run is out of view: a double click brings it back.".strip()
    return Plot(id, "Loss curves", caption, figures, choices)


def band(curves: list[dict[str, Any]], arm: str, kind: str, axis: str) -> Band | None:
    """The curves of an arm on the token grid of its first seed, as far as every seed has come.

    Seeds share the steps, so interpolation changes nothing unless a run logged at other steps; seconds
    differ between seeds and are averaged at equal tokens.
    """
    where, what = KINDS[kind]
    key = AXES[axis][0]
    rows = []
    for curve in (each for each in curves if each["arm"] == arm):
        points = [
            (t, y)
            for t, y in zip(curve.get(where) or [], curve.get(what) or [], strict=False)
            if y is not None
        ]
        timed = [(t, x) for t, x in zip(curve["tokens"], curve.get(key) or [], strict=False) if x is not None]
        if points and timed:
            rows.append((curve["seed"], np.array(points, float).T, np.array(timed, float).T))
    if not rows:
        return None
    grid = rows[0][1][0]
    grid = grid[grid <= min(points[0, -1] for _, points, _ in rows)]
    if not len(grid):
        return None
    x = np.mean([np.interp(grid, *timed) for _, _, timed in rows], axis=0)
    y = np.array([np.interp(grid, *points) for _, points, _ in rows])
    size = -(-len(grid) // BLOCKS)
    starts = np.arange(0, len(grid), size)
    counts = np.diff(np.append(starts, len(grid)))
    return Band(
        np.add.reduceat(x, starts) / counts,
        np.add.reduceat(y, starts, axis=1) / counts,
        tuple(seed for seed, _, _ in rows),
    )


def gap(own: Band, base: Band) -> Band | None:
    """An arm minus the baseline at equal x, seed by seed, where both have been measured."""
    seeds = [seed for seed in own.seeds if seed in base.seeds]
    inside = (own.x >= base.x[0]) & (own.x <= base.x[-1])
    if not seeds or not inside.any():
        return None
    x = own.x[inside]
    y = [own.y[own.seeds.index(s)][inside] - np.interp(x, base.x, base.y[base.seeds.index(s)]) for s in seeds]
    return Band(x, np.array(y), tuple(seeds))


def area(x: list[Any], low: list[float], high: list[float], style: Style) -> go.Scatter:
    """The band between two curves, in the arm's colour, out of the legend and of the hover."""
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=style.colour,
        opacity=0.16,
        line={"width": 0, "color": style.colour},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=style.name,
        name=style.name,
        meta="band",
    )


def _title(setting: dict[str, Any], kind: str) -> str:
    """What a curve measures: the validation of one setting may be bits per byte, of another accuracy."""
    if kind == "training":
        return "training loss in nats"
    key = setting["curves"][0].get("val_key")
    return next((m["title"].lower() for m in setting["metrics"] if m["key"] == key), "validation loss")


def _draw(bands: dict[str, Band], look: dict[str, Style], title: str, axis: str) -> go.Figure:
    _, across, unit = AXES[axis]
    drawn = figure(across, title, hovermode="x unified")
    for label, found in bands.items():
        if len(found.seeds) > 1:
            x, low, high = found.x.tolist(), found.y.min(0).tolist(), found.y.max(0).tolist()
            drawn.add_trace(area(x, low, high, look[label]))
    for label, found in bands.items():
        style, mean = look[label], found.y.mean(0)
        spread = [
            f" ({low:.3f} to {high:.3f})" if len(found.seeds) > 1 else ""
            for low, high in zip(found.y.min(0), found.y.max(0), strict=True)
        ]
        drawn.add_trace(
            go.Scatter(
                x=found.x.tolist(),
                y=mean.tolist(),
                mode="lines" if len(mean) > FEW else "lines+markers",
                marker={"size": 6, "symbol": style.symbol, "color": style.colour},
                line=style.line,
                name=style.name,
                legendgroup=style.name,
                customdata=spread,
                hovertemplate="%{y:.4f}%{customdata}",
                meta="line",
            )
        )
    drawn.update_xaxes(tickformat="~s", unifiedhovertitle={"text": "%{x:.3s} " + unit})
    values = np.concatenate(
        [found.y[:, found.x >= SETTLED * found.x[-1]].ravel() for found in bands.values()]
    )
    edge = 0.05 * (values.max() - values.min()) or 0.01
    drawn.update_yaxes(range=[float(values.min() - edge), float(values.max() + edge)])
    return drawn
