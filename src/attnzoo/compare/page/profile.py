"""The profile as a heat map: a row per arm, a column per task, the accuracy written in every cell."""

from __future__ import annotations

from html import escape
from typing import Any

import plotly.graph_objects as go

from .figures import Plot, figure


def profile_plot(profile: dict[str, Any] | None, id: str = "profile") -> Plot | None:
    """The heat map, or None where no profile was run."""
    if not profile or not profile["arms"] or not profile["tasks"]:
        return None
    arms = [escape(arm, quote=False) for arm in profile["arms"]]
    tasks = [escape(task.replace("_", " "), quote=False) for task in profile["tasks"]]
    mean = [[None if value is None else 100 * value for value in row] for row in profile["mean"]]
    cells, hover = _texts(profile)
    drawn = figure("", "", hovermode="closest")
    drawn.add_trace(
        go.Heatmap(
            x=tasks, y=arms, z=mean, zmin=0, zmax=100, xgap=3, ygap=3, text=cells, texttemplate="%{text}",
            textfont={"size": 13}, customdata=hover, hovertemplate="%{customdata}<extra></extra>", showscale=False,
            colorscale=[[0, "var(--heat-0)"], [0.25, "var(--heat-1)"], [0.5, "var(--heat-2)"],
                        [0.75, "var(--heat-3)"], [1, "var(--heat-4)"]],
        )
    )  # fmt: skip
    drawn.update_yaxes(autorange="reversed", showgrid=False, showline=False, nticks=len(arms))
    drawn.update_xaxes(showgrid=False, showline=False, side="top", tickangle=-40, nticks=len(tasks))
    seeds = [count for row in profile.get("seeds") or [] for count in row if count]
    spread = "; the small numbers are the interval over seeds" if profile.get("low") else ""
    many = f" over {max(seeds)} seeds" if seeds and max(seeds) > 1 else ""
    caption = f"Accuracy in per cent on synthetic tasks, mean{many}{spread}. One small model per task and arm."
    width = 150 + 68 * len(tasks)
    return Plot(id, "Synthetic profile", caption, {(): drawn}, width=width, height=150 + 52 * len(arms))


def _texts(profile: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """What stands in the cells, and what a pointer over them shows."""
    cells, hovers = [], []
    low, high, seeds = (profile.get(key) or [] for key in ("low", "high", "seeds"))
    for i, arm in enumerate(profile["arms"]):
        cells.append([])
        hovers.append([])
        for j, task in enumerate(profile["tasks"]):
            value = profile["mean"][i][j]
            ends = [bound[i][j] if bound and bound[i] else None for bound in (low, high)]
            span = "" if None in ends else f"{100 * ends[0]:.0f}–{100 * ends[1]:.0f}"
            count = f"<br>{seeds[i][j]} seeds" if seeds and seeds[i] and seeds[i][j] else ""
            cells[-1].append("" if value is None else f"{100 * value:.0f}" + (f"<br><sup>{span}</sup>" if span else ""))
            what = "not run" if value is None else f"{100 * value:.1f} %" + (f" ({span})" if span else "")
            hovers[-1].append(f"<b>{escape(arm, quote=False)}</b><br>{escape(task, quote=False)}: {what}{count}")
    return cells, hovers
