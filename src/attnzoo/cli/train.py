"""`attnzoo train`: a Hydra application."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attnzoo import list_variants
from attnzoo.cli import INTERRUPTED, report
from attnzoo.cli.overrides import describe, flatten, order
from attnzoo.train.settings import nearest


def config_folder() -> Path:
    """The Hydra tree: inside the installed package, or beside ``src/`` in a source tree."""
    package = Path(str(files("attnzoo")))
    return next(path for path in (package / "configs", package.parents[1] / "configs") if path.is_dir())


def train(arguments: list[str]) -> int:
    """Run Hydra on the overrides; returns the largest exit code of its jobs."""
    command_line = sys.argv
    codes = [0]

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")
    def job(config: DictConfig) -> None:
        with _argv(command_line):  # Lightning starts further ranks with it
            codes.append(_train_one(config))

    _check_flags(arguments)
    _store_variants()
    try:
        with _argv(["attnzoo train", *order(arguments)]), _raw_errors():
            job()
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(describe(error, _known_keys())) from error
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
        return INTERRUPTED
    print(f"validation: {summary['val_bpb']:.3f} bits per byte (loss {summary['val_loss']:.3f} per token)")
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


def _store_variants() -> None:
    """Let `attention=` know the variants of other packages, which have no YAML in the tree."""
    shipped = {path.stem for path in (config_folder() / "attention").glob("*.yaml")}
    for name in set(list_variants()) - shipped:
        ConfigStore.instance().store(group="attention", name=name, node={"name": name})


def _known_keys() -> set[str]:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        tree = OmegaConf.to_container(hydra.compose("config"), resolve=False)
    return set(flatten(tree))


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
