"""What the scripts share that train many small models: one run as a process, and a table of them."""

from __future__ import annotations

import csv
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

import attnzoo

PROGRAM = "import sys; from attnzoo.cli import main; sys.exit(main())"


def train(overrides: Sequence[str], folder: pathlib.Path) -> tuple[dict[str, Any], bool]:
    """The summary of a run, trained now on one core unless it stands complete in ``folder``.

    Returns:
        The summary, or ``{"error": line}`` of a run that failed; and whether it was trained now.
    """
    summary = folder / "summary.json"
    if summary.exists() and (found := json.loads(summary.read_text()))["status"] == "completed":
        return found, False
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        code = subprocess.run(
            [sys.executable, "-c", PROGRAM, "train", f"hydra.run.dir={folder}", *overrides],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code:
        return {"error": (log.read_text().strip().splitlines() or [f"exit code {code}"])[-1]}, True
    return json.loads(summary.read_text()), True


def one_core() -> dict[str, str]:
    """The columns of a table that say where and when it was made."""
    return {
        "machine": f"{platform.machine()}, 1 of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "attnzoo": attnzoo.__version__,
        "date": datetime.date.today().isoformat(),
    }


def save(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Write a table, with a column for every key of any row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")
