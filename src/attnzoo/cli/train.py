"""`attnzoo train`: a Hydra application."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from attnzoo.cli import RUN_ERROR, explain
from attnzoo.cli.overrides import order
from attnzoo.cli.targets import checked_compositions
from attnzoo.cli.tree import config_folder, plain_errors, store_variants
from attnzoo.cluster.ranks import Team, join, place
from attnzoo.signals import exit_code
from attnzoo.train.settings import nearest

if TYPE_CHECKING:
    from attnzoo.train.prepare import Run

STOPPED = exit_code(0)  # codes from here on are of signals
PICKLED = "--experimental-rerun"  # Hydra's, which would run what a pickle says


def train(arguments: list[str]) -> int:
    """Run Hydra on the overrides; returns the largest exit code of its jobs.

    Several processes of one run, started by torchrun or srun, all do what rank 0 was told. ``--dry-run`` only
    checks and estimates, in one process.
    """
    if "--dry-run" in arguments:
        from attnzoo.cli.dry_run import dry_run

        return dry_run([argument for argument in arguments if argument != "--dry-run"])
    join()
    team = Team(place())
    try:
        return _train(team, arguments)
    except Exception as error:
        return team.end(*explain(error))


def _train(team: Team, arguments: list[str]) -> int:
    command_line = sys.argv
    codes: list[int] = []
    failed: list[Exception] = []  # kept from Hydra, which would print the whole command line
    wait, given = "--wait" in arguments, [argument for argument in arguments if argument != "--wait"]

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")
    def job(config: DictConfig) -> None:
        if codes and codes[-1] >= STOPPED:
            return  # what stopped one job of a multirun stops the others
        try:
            team.begin(given, config.run_dir)
            with _argv(command_line):  # Lightning starts further ranks with it
                codes.append(team.end(*_one(config, given, wait)))
        except Exception as error:
            failed.append(error)

    _check_flags(team, given)
    followed = team.follow(given)
    if followed is None:
        return team.end(RUN_ERROR)
    store_variants()
    line = order(followed)
    with plain_errors(), _argv(["attnzoo train", *line]), _raw_errors(), checked_compositions(line):
        try:
            job()
            if failed:
                raise failed[0]
        except OSError as error:  # Hydra's, which makes the folder before the run begins
            if error.filename is None:  # of a choice that there is not, which is an IOError of its own
                raise
            raise ValueError(
                f"hydra.run.dir: {str(error.filename)!r} cannot be written: {error.strerror}; "
                "give a folder that can be"
            ) from error
    return max(codes) if codes else team.end(0)


def _one(config: DictConfig, arguments: list[str], wait: bool) -> tuple[int, str]:
    """Train, or submit, what was composed; returns the exit code and the error."""
    try:
        if "slurm" in config.launcher and place() is None:
            from attnzoo.cluster.run import submit_run

            return submit_run(OmegaConf.to_container(config, resolve=True), arguments, wait), ""
        if wait:
            raise ValueError("--wait: is for launcher=slurm, got a run on this machine; leave it out")
        return _train_one(config), ""
    except Exception as error:
        _remove_empty(Path(config.run_dir))
        return explain(error)


def _train_one(config: DictConfig) -> int:
    from lightning.pytorch.utilities import rank_zero_only

    from attnzoo.train.prepare import prepare
    from attnzoo.train.run import execute, sample

    run = prepare(config)
    summary = execute(run)
    _remove_empty(Path(config.run_dir))  # where the run was only closed, in its own folder
    lines = [f"run folder: {_short(run.folder)}"]
    if summary["status"] == "stopped":
        lines = [f"stopped at step {summary['steps']}; go on with ckpt_path={_short(run.folder)}"]
    else:
        lines = [*_outcome(run, summary, sample), *lines]
    if rank_zero_only.rank == 0:
        print("\n".join(lines), flush=True)
    return exit_code(signal.Signals[summary["stopped_by"]]) if summary["status"] == "stopped" else 0


def _outcome(run: Run, summary: dict[str, Any], sample: Callable[[Run], str]) -> Iterator[str]:
    loss, share, bits = (summary[key] for key in ("val_loss", "val_accuracy", "val_bpb"))
    if run.corpus.labelled:
        yield f"validation: {share:.1%} correct (loss {loss:.3f} per answer)"
    else:
        yield f"validation: {bits:.3f} bits per byte (loss {loss:.3f} per token)"
        if run.trainer.sample_tokens and not run.launcher.sharded:  # no rank has the whole model
            yield f"sample: {sample(run)}"


def _short(folder: Path) -> Path:
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def _check_flags(team: Team, arguments: list[str]) -> None:
    """Hydra's own parser leaves the process on an unknown flag, after several lines."""
    if team.world > 1 and {"-m", "--multirun"} & set(arguments):
        raise ValueError(
            f"-m: the {team.world} processes here are for one run, got a multirun; use attnzoo sweep"
        )
    parser = get_args_parser()
    known = {flag for action in parser._actions for flag in action.option_strings} - {PICKLED}
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
