"""`attnzoo compare`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from attnzoo.cli import INTERRUPTED
from attnzoo.compare.comparison import compare
from attnzoo.compare.export import write_files
from attnzoo.compare.select import Selection, from_folders, from_sweep
from attnzoo.compare.statistics import Method
from attnzoo.compare.terminal import show


def compare_command(options: argparse.Namespace) -> int:
    """Compare run folders, a sweep, or what a sweep of these arguments gives; print and write the result."""
    method = Method(options.interval, options.level, options.correction)  # before a sweep that takes hours
    code = 0
    if any("=" in argument and not Path(argument).exists() for argument in options.runs):
        folder, code = _sweep(options.runs, options.baseline)
        if code == INTERRUPTED:
            return code
        selection = from_sweep(folder)
    else:
        selection, folder = _select(options.runs)
    found = compare(
        selection,
        method,
        baseline=options.baseline,
        force=options.force,
        command=shlex.join(["attnzoo", "compare", *options.runs]),
    )
    show(found)
    for path in write_files(found, Path(options.out) if options.out else folder):
        print(f"wrote {path}")
    return code


def _select(arguments: Sequence[str]) -> tuple[Selection, Path]:
    """The runs that are named, and where their comparison belongs."""
    if arguments[0] == "sweep" and len(arguments) == 2:
        from attnzoo.sweep.commands import find

        folder = find(arguments[1])
        return from_sweep(folder), folder
    return from_folders([Path(a) for a in arguments]), Path(f"runs/compare-{datetime.now():%Y%m%d-%H%M%S}")


def _sweep(arguments: Sequence[str], baseline: str | None) -> tuple[Path, int]:
    """Run the sweep of these arguments, or go on with it; returns its folder and exit code."""
    from attnzoo.sweep import commands
    from attnzoo.sweep.manifest import FILE, read_manifest
    from attnzoo.sweep.request import read_request

    # a sweep refuses a baseline that is not in it before anything is trained
    arguments = [*arguments, f"baseline={baseline}"] if baseline else arguments
    request = read_request(arguments)
    folder = commands.ROOT / (request.name or "")
    if request.name is None or not (folder / FILE).is_file():
        manifest, code = commands.start([*arguments, "--wait"])
        return manifest.folder, code
    before = read_manifest(folder)
    rematched = request.match and request.baseline not in (None, before.baseline)
    if rematched or _about(before.command) != _about(arguments):
        raise ValueError(
            f"name: {request.name} is another sweep, of {shlex.join(before.command)}; give another name, or "
            f"compare it by attnzoo compare sweep {request.name}"
        )
    return folder, commands.resume(folder, request.jobs, wait=True)[1]


def _about(arguments: Sequence[str]) -> set[str]:
    """The arguments that say which runs a sweep has."""
    return {a for a in arguments if a != "--wait" and not a.startswith(("jobs=", "baseline="))}
