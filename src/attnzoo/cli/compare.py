"""`attnzoo compare`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from attnzoo.compare.comparison import compare
from attnzoo.compare.export import write_files
from attnzoo.compare.select import Selection, from_folders, from_sweep
from attnzoo.compare.statistics import Method
from attnzoo.compare.terminal import show


def compare_command(options: argparse.Namespace) -> int:
    """Compare run folders, a sweep, or what a sweep of these arguments gives; print and write the result."""
    method = Method(options.interval, options.level, options.correction)
    selection, folder = _select(options.runs)
    command = shlex.join(["attnzoo", "compare", *options.runs])
    found = compare(selection, method, baseline=options.baseline, force=options.force, command=command)
    show(found)
    for path in write_files(found, Path(options.out) if options.out else folder):
        print(f"wrote {path}")
    return 0


def _select(arguments: Sequence[str]) -> tuple[Selection, Path]:
    """The runs that the arguments mean, and where the comparison belongs."""
    if arguments[0] == "sweep" and len(arguments) == 2:
        folder = _sweep_folder(arguments[1])
        return from_sweep(folder), folder
    assigned = [argument for argument in arguments if "=" in argument]
    if not assigned:
        return from_folders([Path(a) for a in arguments]), Path(
            f"runs/compare-{datetime.now():%Y%m%d-%H%M%S}"
        )
    raise ValueError("compare: sweep arguments come later")


def _sweep_folder(name: str) -> Path:
    return (
        Path(name) if Path(name).is_dir() and (Path(name) / "manifest.json").exists() else Path("runs") / name
    )
