"""Metrics as files: one JSON object per line, and the same as a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from attnzoo.train.metrics import COLUMNS
from attnzoo.train.store import write_atomic


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
        _append(self.folder / "metrics.jsonl", json.dumps(metrics) + "\n")
        header = not (self.folder / "metrics.csv").exists()
        _append(self.folder / "metrics.csv", _row(metrics, header))


def _row(metrics: Mapping[str, float], header: bool) -> str:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
    if header:
        table.writeheader()
    table.writerow(metrics)
    return text.getvalue()


def _append(path: Path, text: str) -> None:
    """Add whole lines; what a full disk took of them is removed again."""
    with open(path, "ab", buffering=0) as file:
        before, data = file.tell(), text.encode()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            with suppress(OSError):
                file.truncate(before)
            raise OSError(error.errno, error.strerror, str(path)) from error


def forget_after(folder: Path, step: int) -> None:
    """Drop the reports of later steps, which a run resumed at ``step`` writes again, and a torn last line."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    entries = filter(None, map(_parsed, path.read_bytes().splitlines()))
    kept = [entry for entry in entries if entry["step"] <= step]
    lines = "".join(json.dumps(entry) + "\n" for entry in kept)
    rows = "".join(_row(entry, header=not i) for i, entry in enumerate(kept))
    for name, text in (("metrics.jsonl", lines), ("metrics.csv", rows)):
        if text:
            write_atomic(folder / name, lambda file, text=text: file.write(text.encode()))
        else:
            (folder / name).unlink(missing_ok=True)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:  # the run was killed while it wrote the line
        return None
