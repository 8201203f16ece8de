"""The comparison as files: all of it as JSON, the results as a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = (
    "setting",
    "metric",
    "unit",
    "better",
    "arm",
    "mean",
    "sd",
    "n",
    "difference",
    "low",
    "high",
    "ratio",
    "p",
    "p_adjusted",
    "verdict",
    "seeds_needed",
    "reason",
)


def write_files(comparison: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write comparison.json, comparison.csv and report.html into ``folder``; returns their paths."""
    from attnzoo.compare.page import write_page  # plotly, which nothing else here needs

    folder.mkdir(parents=True, exist_ok=True)
    whole, table, page = (folder / name for name in ("comparison.json", "comparison.csv", "report.html"))
    whole.write_text(json.dumps(comparison, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    write_table(comparison, table)
    write_page(dict(comparison), page)
    return [whole, table, page]


def write_table(comparison: Mapping[str, Any], path: Path) -> None:
    """One row per setting, metric and arm; one column per seed at the end."""
    results = [(s, r) for s in comparison["settings"] for r in s["results"]]
    seeds = sorted({seed for _, result in results for seed in result["values"]}, key=int)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*COLUMNS, *(f"seed {seed}" for seed in seeds)], extrasaction="ignore")
        table.writeheader()
        for setting, result in results:
            metric = next(m for m in setting["metrics"] if m["key"] == result["metric"])
            values = {f"seed {seed}": value for seed, value in result["values"].items()}
            table.writerow({**metric, **result, "setting": setting["name"], **values})
