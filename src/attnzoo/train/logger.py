"""Metrics as files: one JSON object per line, and the same as a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from attnzoo.train.metrics import COLUMNS


class FileLogger(Logger):
    """Appends every report to ``metrics.jsonl`` and ``metrics.csv`` of the run folder.

    Args:
        folder: an existing run folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    @property
    def name(self) -> str:
        return "files"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the run folder holds the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # opened for each report: a killed run keeps every line, and reports are rare
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        with open(self.folder / "metrics.csv", "a", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            if file.tell() == 0:
                table.writeheader()
            table.writerow(metrics)


def forget_after(folder: Path, step: int) -> None:
    """Drop the reports of later steps, which a run resumed at ``step`` writes again."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    kept = [entry for entry in map(json.loads, path.read_text().splitlines()) if entry["step"] <= step]
    logger = FileLogger(str(folder))
    for name in ("metrics.jsonl", "metrics.csv"):
        (folder / name).unlink(missing_ok=True)
    for entry in kept:
        logger.log_metrics(entry)
