"""`attnzoo sweep`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from attnzoo.cli.zoo import table
from attnzoo.sweep import commands
from attnzoo.sweep.manifest import Manifest, read_manifest
from attnzoo.sweep.request import whole
from attnzoo.train.settings import nearest

USAGE = """\
attnzoo sweep [key=value[,value...]]... [options]   train every combination, each as a process of its own
attnzoo sweep status [NAME]                         what happened to each cell; without a name, all sweeps
attnzoo sweep resume NAME [jobs=N] [--wait]         go on: nothing that is done is repeated
attnzoo sweep retry-failed NAME [jobs=N] [--wait]   give failed cells another attempt, and resume
attnzoo sweep cancel NAME                           stop running cells with a checkpoint; resume goes on

values    as Hydra reads them: attention=mha,mla  seed=range(1,4)  attention=glob(m*a)
seeds=N   short for seed=1,2,...,N
name=     of the folder under runs/
jobs=N    cells at the same time on this machine
match=    params, train_flops or cache: sizes are solved so that all arms spend what the baseline does;
          baseline=mha  match.by=auto  match.tolerance=0.01
tune=lr   the best learning rate of each arm first; tune.lr=[1e-3,3e-3]  tune.seed=9
launcher=slurm launcher.slurm.partition=...   as an array of jobs; --wait stays until they have ended
"""


def sweep(arguments: list[str]) -> int:
    """Start a sweep, or do one of the other things with an existing one; returns the exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    others: dict[str, Callable[[list[str]], int]] = {
        "status": _status,
        "resume": lambda rest: _go_on("resume", commands.resume, rest),
        "retry-failed": lambda rest: _go_on("retry-failed", commands.retry_failed, rest),
        "cancel": _cancel,
    }
    first = arguments[0]
    if first in others:
        return others[first](arguments[1:])
    if "=" not in first and not first.startswith(("-", "~")):
        raise ValueError(f"sweep: no such command {first!r}; {nearest(first, others)}")
    return commands.start(arguments)[1]


def _go_on(command: str, run: Callable[..., tuple[Manifest, int]], arguments: list[str]) -> int:
    jobs = None
    names = []
    for argument in arguments:
        if argument.startswith("jobs="):
            jobs = whole("jobs", argument.removeprefix("jobs="))
        elif argument != "--wait":
            names.append(argument)
    return run(_folder(command, names), jobs, "--wait" in arguments)[1]


def _cancel(arguments: list[str]) -> int:
    print_state(commands.cancel(_folder("cancel", arguments)))
    return 0


def _status(arguments: list[str]) -> int:
    if arguments:
        print_state(read_manifest(_folder("status", arguments)))
        return 0
    rows = [["sweep", "started", "cells", "done", "failed", ""]]
    for folder in commands.sweeps():
        rows.append(commands.overview(folder))
    print(table(rows) if len(rows) > 1 else "no sweeps under runs/")
    return 0


def print_state(manifest: Manifest) -> None:
    """The table of a sweep's cells as they are now."""
    commands.print_table(manifest, commands.states_now(manifest))


def _folder(command: str, arguments: list[str]) -> Path:
    if len(arguments) != 1 or arguments[0].startswith("-") or "=" in arguments[0]:
        raise ValueError(f"sweep {command}: needs the name of one sweep, got {' '.join(arguments) or 'none'}")
    return commands.find(arguments[0])
