"""Sweeps of tiny runs as processes of their own, for the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from attnzoo.sweep.manifest import Cell, Manifest, read_manifest
from attnzoo.sweep.state import states
from runs import metrics_so_far, overrides, train

PROGRAM = "import sys; from attnzoo.cli import main; sys.exit(main())"
PATIENCE = 300.0  # seconds; a failed test takes that long, a passed one never does


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """`attnzoo sweep` in ``folder``, whose runs/ it then holds; its output goes to sweep.out there."""
    with (folder / "sweep.out").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "sweep", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def sweep(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run `attnzoo sweep` to its end; returns the exit code and what it said."""
    file = folder / "sweep.out"
    before = file.stat().st_size if file.exists() else 0
    code = start(folder, *arguments).wait(PATIENCE)
    return code, file.read_bytes()[before:].decode()


def tiny(folder: Path, *more: str) -> list[str]:
    """The arguments of a sweep of tiny runs called "s"."""
    keys = {argument.partition("=")[0] for argument in more}
    return [*(o for o in overrides(folder) if o.partition("=")[0] not in keys), "name=s", *more]


def manifest(folder: Path) -> Manifest:
    """The sweep "s"."""
    return read_manifest(folder / "runs" / "s")


def statuses(folder: Path) -> list[str]:
    """Of the cells, in order."""
    return [outcome.status for outcome in states(manifest(folder)).values()]


def steps(folder: Path, cell: Cell) -> list[int]:
    """The optimiser steps that a cell's run has logged so far."""
    return [line["step"] for line in metrics_so_far(manifest(folder).run_folder(cell))]


def check_two_ranks(folder: Path, *options: str) -> None:
    """The only cell of "s" is one run of two ranks, and learned what one rank learns with these options."""
    (cell,) = manifest(folder).cells
    run = manifest(folder).run_folder(cell)
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2
    assert steps(folder, cell) == [1, 2, 3, 4]
    _, alone = train(folder, *options, name="alone")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val_bpb"] == pytest.approx(alone["val_bpb"], rel=1e-5)


def until(condition: Callable[[], bool]) -> None:
    """Come back as soon as ``condition`` holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)
