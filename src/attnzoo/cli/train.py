"""`attnzoo train`: a Hydra application."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from attnzoo.cli import report
from attnzoo.cli.overrides import order
from attnzoo.cli.tree import config_folder, plain_errors, store_variants
from attnzoo.signals import exit_code
from attnzoo.train.settings import nearest

STOPPED = exit_code(0)  # codes from here on are of signals


def train(arguments: list[str]) -> int:
    """Run Hydra on the overrides; returns the largest exit code of its jobs."""
    command_line = sys.argv
    codes = [0]

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")
    def job(config: DictConfig) -> None:
        with _argv(command_line):  # Lightning starts further ranks with it
            # what stopped one job of a multirun stops the others
            codes.append(codes[-1] if codes[-1] >= STOPPED else _train_one(config))

    _check_flags(arguments)
    store_variants()
    with plain_errors(), _argv(["attnzoo train", *order(arguments)]), _raw_errors():
        job()
    return max(codes)


def _train_one(config: DictConfig) -> int:
    from attnzoo.train.prepare import prepare
    from attnzoo.train.run import execute, sample

    try:
        run = prepare(config)
        summary = execute(run)
    except Exception as error:
        _remove_empty(Path(config.run_dir))
        return report(error)
    if summary["status"] == "stopped":
        print(f"stopped at step {summary['steps']}; go on with ckpt_path={_short(run.folder)}")
        return exit_code(signal.Signals[summary["stopped_by"]])
    loss, share, bits = (summary[key] for key in ("val_loss", "val_accuracy", "val_bpb"))
    if run.corpus.labelled:
        print(f"validation: {share:.1%} correct (loss {loss:.3f} per answer)")
    else:
        print(f"validation: {bits:.3f} bits per byte (loss {loss:.3f} per token)")
        if run.trainer.sample_tokens:
            print(f"sample: {sample(run)}")
    print(f"run folder: {_short(run.folder)}")
    return 0


def _short(folder: Path) -> Path:
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _check_flags(arguments: list[str]) -> None:
    """Hydra's own parser leaves the process on an unknown flag, after several lines."""
    parser = get_args_parser()
    known = {flag for action in parser._actions for flag in action.option_strings}
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("-") and flag not in known:
            raise ValueError(f"{flag}: no such flag of attnzoo train; {nearest(flag, known)}")


def _remove_empty(folder: Path) -> None:
    """Remove what Hydra made for a run that never began: its folder, its parents in the working directory."""
    inside = [folder, *folder.parents]
    for path in inside[: inside.index(Path.cwd())] if Path.cwd() in inside else [folder]:
        try:
            path.rmdir()
        except OSError:  # it holds something, or was never made
            return


@contextmanager
def _argv(arguments: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _raw_errors() -> Iterator[None]:
    """Make Hydra raise its errors instead of printing them."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before
