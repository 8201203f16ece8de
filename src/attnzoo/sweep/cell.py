"""The process of one cell: `python -m attnzoo.sweep.cell SWEEP_FOLDER CELL_ID`.

It trains as `attnzoo train` does, in the cell's own run folder, and goes on from a checkpoint that an earlier
attempt left there. A lock makes sure that no two processes ever train the same cell. With several ranks (an
environment as torchrun makes it) each is such a process: rank 0 holds the lock and tells the others where to
start.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import OmegaConf

from attnzoo.cli import INTERRUPTED, report
from attnzoo.redaction import print_error, redact_output, redact_text
from attnzoo.sweep.manifest import Cell, Manifest, read_manifest
from attnzoo.sweep.state import DONE, FAILED, STOPPED, Outcome, attempts, completed, write_outcome
from attnzoo.train.checkpoint import read_checkpoint
from attnzoo.train.folder import lacks_summary, write_json
from attnzoo.train.guard import RunFailed
from attnzoo.train.prepare import prepare, read_groups
from attnzoo.train.run import execute
from attnzoo.train.store import FOLDER, checkpoints, newest_intact


def main(arguments: list[str] | None = None) -> int:
    """Train the cell; returns 0 if it completed, 130 if it was stopped, else 1 or 2."""
    if arguments is None:
        redact_output()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("cell")
    parser.add_argument("--watch", action="store_true", help="stop when standard input ends")
    options = parser.parse_args(arguments)
    if options.watch:
        threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    manifest = read_manifest(options.folder.resolve())
    cell = manifest.cell(options.cell)
    os.chdir(manifest.cwd)
    if int(os.environ.get("RANK", "0")):
        start = _told_start(manifest, cell)
        return 0 if start is None else _train(_config(manifest, cell, start["ckpt_path"])).code
    with FileLock(manifest.lock_file(cell)):
        return _first_rank(manifest, cell)


def _first_rank(manifest: Manifest, cell: Cell) -> int:
    begun, count = time.monotonic(), attempts(manifest, cell)
    if completed(manifest, cell):
        _tell_start(manifest, cell, None)
        outcome = Outcome(DONE, attempts=max(count, 1))
    else:
        try:
            ckpt_path = _starting_point(manifest, cell)
            _tell_start(manifest, cell, {"ckpt_path": ckpt_path})
            outcome = _train(_config(manifest, cell, ckpt_path))
        except Exception as error:
            outcome = Outcome(FAILED, 1, _explain(error))
        outcome = replace(outcome, attempts=count + 1, seconds=round(time.monotonic() - begun, 2))
    write_outcome(manifest, cell, outcome)
    return outcome.code


def _train(config: dict[str, Any]) -> Outcome:
    """An ordinary run."""
    try:
        summary = execute(prepare(OmegaConf.create(config)))
    except Exception as error:
        return Outcome(FAILED, 2 if isinstance(error, ValueError) else 1, _explain(error))
    if summary["status"] == "stopped":
        print(f"stopped at step {summary['steps']}", flush=True)
        return Outcome(STOPPED, INTERRUPTED, f"at step {summary['steps']}")
    return Outcome(DONE)


def _explain(error: Exception) -> str:
    """Print the error, with its stack where it is not the user's; returns it in one line."""
    if not isinstance(error, (ValueError, RunFailed)):
        print_error(error)
    report(error)
    text = str(error) if isinstance(error, (ValueError, RunFailed)) else f"{type(error).__name__}: {error}"
    return "; ".join(line.strip() for line in redact_text(text).splitlines() if line.strip())


def _config(manifest: Manifest, cell: Cell, ckpt_path: str | None) -> dict[str, Any]:
    folder = str(manifest.run_folder(cell))
    # a manifest may come from elsewhere: what it may build is for this process's environment to say
    own = {"run_dir": folder, "ckpt_path": ckpt_path, "allow_targets": []}
    return dict(cell.config) | own


def _starting_point(manifest: Manifest, cell: Cell) -> str | None:
    """What to go on from: the run folder, or, saying so, an older checkpoint where the newest is damaged.

    A run folder without any checkpoint is removed, as is one at its end that has too little for a summary.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged: a person has to look.
    """
    folder = manifest.run_folder(cell)
    start, saved = folder, checkpoints(folder / FOLDER)
    try:
        checkpoint = read_checkpoint(folder) if saved else None
    except ValueError as error:
        start = newest_intact(folder / FOLDER)
        if start is None:
            raise ValueError(f"{error}; remove {str(folder)!r} to train this cell from its start") from error
        print(f"{error}; this cell goes on from there", flush=True)
        checkpoint = read_checkpoint(start)
    if checkpoint and _something_left(cell, folder, checkpoint):
        return str(start)
    if folder.exists():  # killed before its first checkpoint
        shutil.rmtree(folder)
    return None


def _something_left(cell: Cell, folder: Path, checkpoint: dict[str, Any]) -> bool:
    """Steps, or, of a run that was killed after its last checkpoint, the summary."""
    trainer, _, data = read_groups(cell.config)
    steps, seconds = trainer.total_steps(data.batch_size * data.seq_len), trainer.max_seconds
    progress = checkpoint["progress"]
    over = (steps and progress["step"] >= steps) or (seconds and progress["seconds"] >= seconds)
    return not over or lacks_summary(folder, checkpoint, steps, seconds)


def _start_file(manifest: Manifest, cell: Cell) -> Path:
    return manifest.lock_file(cell).with_suffix(".start")


def _tell_start(manifest: Manifest, cell: Cell, start: dict[str, Any] | None) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        attempt = os.environ["TORCHELASTIC_RUN_ID"]
        write_json(_start_file(manifest, cell), {"attempt": attempt, "start": start})


def _told_start(manifest: Manifest, cell: Cell) -> dict[str, Any] | None:
    """What rank 0 of the same attempt told, once it has."""
    while True:
        try:
            told = json.loads(_start_file(manifest, cell).read_text())
        except (OSError, ValueError):
            told = {}
        if told.get("attempt") == os.environ["TORCHELASTIC_RUN_ID"]:
            return told["start"]
        time.sleep(0.2)


def _stop_at_end_of_input() -> None:
    """The sweep holds the other end: it ends when the sweep asks for a stop or dies, in whatever way."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
