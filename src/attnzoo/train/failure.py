"""What ended a run from outside, in one line: the disk, a worker process, another rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attnzoo.parallel.pulse import Pulse
from attnzoo.train.batches import Loader
from attnzoo.train.guard import RunFailed
from attnzoo.train.store import FOLDER, FULL, LAST


def explain(error: BaseException, folder: Path, loader: Loader, pulse: Pulse, step: int) -> BaseException:
    """The error that the user gets: ``error`` itself where it says all that is known.

    Args:
        folder: of the run.
        step: the one that did not come to its end.
    """
    # what a worker's error says of itself; then the connection, with which goes whatever else was under way
    text = loader.explain(error) or pulse.explain(error) or _of_loader(error, loader) or _disk(error)
    return RunFailed(f"step {step}: {text}; {way_on(folder)}") if text else error


def _of_loader(error: BaseException | None, loader: Loader) -> str | None:
    """A death is raised wherever the process happens to be, and may turn into another error there."""
    seen = []
    while error is not None and error not in seen:
        if text := loader.explain(error):
            return text
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def opening(folder: Path) -> Iterator[None]:
    """What the system refuses of the first files of a run's folder is a ValueError: nothing is lost yet."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"hydra.run.dir: {str(folder)!r} cannot be written: {_reason(error)}; give a folder that can be, "
            "with room for the checkpoints"
        ) from error


@contextmanager
def closing(folder: Path) -> Iterator[None]:
    """What the system refuses of the summary is a RunFailed: the last checkpoint is there already."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"the summary cannot be written: {_reason(error)}; {way_on(folder)}") from error


def way_on(folder: Path) -> str:
    """What to do after a run in ``folder`` has failed."""
    try:
        last = (folder / FOLDER / LAST).read_text().strip().partition(".")[0]
    except OSError:
        return "there is no checkpoint yet: start again"
    return f"the last checkpoint is {last}: resume with ckpt_path={folder}"


def _disk(error: BaseException) -> str | None:
    if not isinstance(error, OSError) or not error.filename:
        return None
    return f"{str(error.filename)!r} cannot be written or read: {_reason(error)}"


def _reason(error: OSError) -> str:
    return "the disk is full, make room" if error.errno in FULL else error.strerror or str(error)
