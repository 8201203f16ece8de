"""Accuracy over the synthetic tasks: one row per arm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from attnzoo.compare.comparable import conditions
from attnzoo.compare.results import Setting
from attnzoo.compare.statistics import mean_interval


def task_of(setting: Setting) -> str:
    """The name of a setting's synthetic task."""
    return str(conditions(setting.members[0].run)["data"]).removeprefix("synthetic/")


def profile(settings: Sequence[Setting], arms: Sequence[str], level: float) -> dict[str, Any] | None:
    """Mean accuracy and its interval over the seeds, within [0, 1]; None without synthetic settings."""
    scored = [s for s in settings if s.synthetic and any(s.values["accuracy"].values())]
    if not scored:
        return None
    names = Counter(task_of(setting) for setting in scored)
    tasks = [task_of(s) if names[task_of(s)] == 1 else s.name for s in scored]
    rows: dict[str, list[list[Any]]] = {"mean": [], "low": [], "high": [], "seeds": []}
    for arm in arms:
        cells = [_cell(list(s.values["accuracy"].get(arm, {}).values()), level) for s in scored]
        for key, column in zip(rows, zip(*cells, strict=True), strict=True):
            rows[key].append(list(column))
    return {"tasks": tasks, "arms": list(arms), **rows}


def _cell(values: list[float], level: float) -> tuple[float | None, float | None, float | None, int]:
    if not values:
        return None, None, None, 0
    interval = mean_interval(values, level)
    low, high = (min(max(x, 0.0), 1.0) for x in interval) if interval else (None, None)
    return fmean(values), low, high, len(values)
