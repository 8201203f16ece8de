"""The profile as a heat map: a row per arm, a column per task, the accuracy written in every cell."""

from __future__ import annotations

from html import escape
from typing import Any

import plotly.graph_objects as go

from attnzoo.compare.page.figures import Plot, figure

TURN = 60  # per cent: the colour at which the writing changes between dark and light, in both themes


def profile_plot(profile: dict[str, Any] | None, id: str = "profile") -> Plot | None:
    """The heat map, or None where no profile was run; on a phone it lies on its side."""
    if not profile or not profile["arms"] or not profile["tasks"]:
        return None
    arms = [escape(arm, quote=False) for arm in profile["arms"]]
    tasks = [escape(task.replace("_", " "), quote=False) for task in profile["tasks"]]
    mean = [[None if value is None else 100 * value for value in row] for row in profile["mean"]]
    cells = [[_cell(profile, i, j) for j in range(len(tasks))] for i in range(len(arms))]
    seeds = [count for row in profile.get("seeds") or [] for count in row if count]
    many = f", mean over {max(seeds)} seeds" if seeds and max(seeds) > 1 else ""
    spread = "; below it, where there is room, the interval over seeds" if profile.get("low") else ""
    return Plot(
        id,
        "Synthetic profile",
        f"Accuracy in per cent on synthetic tasks{many}{spread}. One small model per task and arm.",
        {(): _draw(tasks, arms, mean, cells)},
        height=150 + 46 * len(arms),
        width=170 + 56 * len(tasks),
        narrow=_draw(arms, tasks, _turned(mean), _turned(cells), short=True),
        narrow_height=130 + 29 * len(tasks),
        narrow_width=170 + 27 * len(arms),
    )


def _turned(rows: list[list[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _draw(
    across: list[str],
    down: list[str],
    mean: list[list[float | None]],
    cells: list[list[tuple[str, str, str]]],
    short: bool = False,
) -> go.Figure:
    drawn = figure("", "", hovermode="closest", showlegend=False)
    drawn.add_trace(
        go.Heatmap(
            x=across,
            y=down,
            z=mean,
            zmin=0,
            zmax=100,
            xgap=2,
            ygap=2,
            showscale=False,
            colorscale=[
                [0, "var(--heat-0)"],
                [TURN / 200, "var(--heat-1)"],
                [TURN / 100, "var(--heat-2)"],
                [1, "var(--heat-3)"],
            ],
            customdata=[[hover for _, _, hover in row] for row in cells],
            hovertemplate="<b>%{y}</b>, <b>%{x}</b><br>%{customdata}<extra></extra>",
        )
    )
    drawn.add_trace(_writing(across, down, mean, cells, short))
    every = {"tickmode": "linear", "dtick": 1, "showgrid": False, "showline": False, "ticks": ""}
    drawn.update_yaxes(autorange="reversed", **every)
    drawn.update_xaxes(side="top", tickangle=-40, **every)
    return drawn


def _writing(across: list[str], down: list[str], mean: list, cells: list, short: bool) -> go.Scatter:
    """The numbers in the cells, in whichever ink reads better; ``short``: the mean alone."""
    written = [(i, j) for i in range(len(down)) for j in range(len(across)) if mean[i][j] is not None]
    return go.Scatter(
        x=[across[j] for _, j in written],
        y=[down[i] for i, _ in written],
        mode="text",
        text=[cells[i][j][0] if short else f"<b>{cells[i][j][0]}</b>{cells[i][j][1]}" for i, j in written],
        textfont={"size": 12, "color": [f"var(--heat-ink-{int(mean[i][j] > TURN)})" for i, j in written]},
        hoverinfo="skip",
        meta="numbers",
    )


def _cell(profile: dict[str, Any], i: int, j: int) -> tuple[str, str, str]:
    """The mean and the interval as they stand in a cell, and what a pointer over it shows."""
    value = profile["mean"][i][j]
    if value is None:
        return "", "", "not run"
    low, high = (
        profile[key][i][j] if profile.get(key) and profile[key][i] else None for key in ("low", "high")
    )
    span = "" if low is None or high is None else f"{100 * low:.0f}–{100 * high:.0f}"
    count = profile["seeds"][i][j] if profile.get("seeds") else None
    hover = f"{100 * value:.1f} %{f' ({span})' if span else ''}"
    seeds = f", {count} seed{'s' if count > 1 else ''}" if count else ""
    return f"{100 * value:.0f}", f"<br>{span}" if span else "", hover + seeds
