"""Checkpoints on disk: complete or absent, each with its checksum beside it, and which of them stay."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from attnzoo.train.guard import RunFailed

FORMAT = 2
FOLDER = "checkpoints"
LAST = "last"  # a text file that names the newest complete checkpoint
NAME = re.compile(r"step-(\d+)(\.pt)?")  # a file, or a folder of shards
SUM = ".sha256"  # what `sha256sum -c` reads, beside each file
SUMS = "SHA256SUMS"  # the same inside a folder of shards
BLOCK = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a system says of a disk without room


def write_atomic(
    path: Path, write: Callable[[IO[bytes]], Any], check: Callable[[Path], None] = lambda path: None
) -> None:
    """Write a file that is either complete or absent, whatever happens meanwhile.

    The bytes go to a temporary file of the same folder, reach the disk, pass ``check`` there, and only then
    take the name.
    """
    # nobody else may read it, or guess its name, before it is what the folder lets others see
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fchmod(file.fileno(), path.parent.stat().st_mode & 0o666)
            os.fsync(file.fileno())
        check(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk, on systems that can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_checkpoint(
    folder: Path, step: int, content: dict[str, Any], keep: int, keep_every: int | None = None
) -> Path:
    """Add a checkpoint to ``folder``, read it back, point `last` to it, then remove those that need not stay.

    Args:
        keep: how many of the newest stay.
        keep_every: those at multiples of so many steps stay as well.

    Raises:
        RunFailed: the disk took no complete checkpoint; the earlier ones and `last` are as they were.
    """
    path = folder / f"step-{step:08d}.pt"
    with saving(folder, step):
        line = f"{write_checked(path, content)}  {path.name}\n"
        write_atomic(sum_file(path), lambda file: file.write(line.encode()))
        point(path)
        forget(folder, step, keep, keep_every)
    return path


def write_checked(path: Path, content: dict[str, Any]) -> str:
    """Write plain tensors and values, and read the bytes back; returns their SHA-256."""
    watched = _Watched()

    def check(temporary: Path) -> None:
        if file_sum(temporary, fresh=True) != watched.sum:
            raise OSError("what was read back is not what was written")
        sum_file(path).unlink(missing_ok=True)  # of an earlier file of this name

    write_atomic(path, lambda file: _save(content, watched.on(file)), check)
    return watched.sum


@contextmanager
def saving(folder: Path, step: int, clean: bool = True) -> Iterator[None]:
    """Readies ``folder`` for a checkpoint, if ``clean``; what the system refuses becomes a `RunFailed` of one
    line.
    """
    try:
        if clean:
            folder.mkdir(exist_ok=True)
            _clean(folder)
        yield
    except OSError as error:
        full = error.errno in FULL
        try:
            good = f"the last good one is {folder / (folder / LAST).read_text().strip()}"
        except OSError:
            good = "there is none"
        reason = "the disk is full" if full else str(error)
        way_out = "make room" if full else f"see to {str(folder)!r}"
        raise RunFailed(
            f"checkpoint of step {step}: {reason}; {good}; {way_out} and resume with ckpt_path"
        ) from error


def point(path: Path) -> None:
    """Let `last` name a complete checkpoint."""
    write_atomic(path.parent / LAST, lambda file: file.write(f"{path.name}\n".encode()))


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, the newest first; some may have been damaged since."""
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says, -1 for another name."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def forget(folder: Path, step: int, keep: int, keep_every: int | None) -> None:
    """Remove all but the ``keep`` newest, those of every ``keep_every`` steps, and the one of ``step``.

    Later ones are of a course that was given up: the run went back to an earlier one.
    """
    known = checkpoints(folder)
    newest = [path for path in known if step_of(path) <= step][:keep]
    for path in known:
        stays = path in newest or (keep_every and step_of(path) % keep_every == 0)
        if step_of(path) > step or not stays:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint; it is whole or gone."""
    if path.is_dir():
        gone = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        os.replace(path, gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)
        sum_file(path).unlink(missing_ok=True)


def _clean(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote or removed something."""
    for stale in folder.glob(".*.tmp"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    for lone in folder.glob(f"step-*{SUM}"):
        if not lone.with_name(lone.name.removesuffix(SUM)).exists():
            lone.unlink()


def sum_file(path: Path) -> Path:
    """Where the checksum of a checkpoint file is."""
    return path.with_name(path.name + SUM)


def file_sum(path: Path, fresh: bool = False) -> str:
    """SHA-256 of a file; ``fresh`` reads it from the disk where the system lets us, not from its cache."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if fresh and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, in words that follow its name; None if nothing is."""
    if not path.exists():
        return "does not exist"
    sums = path / SUMS if path.is_dir() else sum_file(path)
    try:
        if sums.exists():
            return _compare(sums)
        if path.is_dir():
            return f"is damaged: it lacks {SUMS}"
        with zipfile.ZipFile(path) as archive:  # it was copied alone, or by a version without checksums
            sound = archive.testzip() is None
    except (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile):
        sound = False
    return None if sound else "is truncated or no checkpoint of plain tensors"


def _compare(sums: Path) -> str | None:
    for line in sums.read_text().splitlines():
        expected, _, name = line.partition("  ")
        file = sums.with_name(name)
        if not file.is_file() or file_sum(file) != expected:
            part = "" if sums.name.endswith(SUM) else f"{name} "
            return f"is damaged: {part}differs from its checksum in {sums.name}, truncated or changed since"
    return None


def newest_intact(folder: Path, without: Iterable[Path] = ()) -> Path | None:
    """The newest undamaged checkpoint of a checkpoints folder; reads all that are newer."""
    skipped = {path.resolve() for path in without}
    found = (path for path in checkpoints(folder) if path.resolve() not in skipped and damage(path) is None)
    return next(found, None)


class _Watched:
    """A binary file that sums up what is written."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def on(self, file: IO[bytes]) -> _Watched:
        self.file = file
        return self

    @property
    def sum(self) -> str:
        return self.digest.hexdigest()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _save(content: dict[str, Any], watched: _Watched) -> None:
    try:
        torch.save({"format": FORMAT, **content}, watched)
    except RuntimeError as error:
        if error.__context__ is None:
            raise
        # whatever interrupts it, a full disk or what a signal raises: torch closes a file that is not whole,
        # and it is this that it reports
        raise error.__context__ from error
