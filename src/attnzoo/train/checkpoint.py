"""Checkpoints: complete or absent, plain tensors and values, loadable without running any pickled code."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from attnzoo.train.guard import RunFailed

FORMAT = 1
FOLDER = "checkpoints"
LAST = "last"  # a text file that names the newest complete checkpoint
KEYS = ("model", "model_config", "tokenizer", "identity", "optimizer", "progress")


def write_atomic(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file that is either complete or absent, whatever happens meanwhile.

    The bytes go to a temporary file of the same folder, reach the disk, and only then take the name.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # the file is in place, and not every system can flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_checkpoint(folder: Path, step: int, content: dict[str, Any], keep: int) -> Path:
    """Add a checkpoint to ``folder``, point `last` to it, then remove all but the newest ``keep``.

    Raises:
        RunFailed: the disk took no complete checkpoint; the earlier ones and `last` are as they were.
    """
    path = folder / f"step-{step:08d}.pt"
    try:
        folder.mkdir(exist_ok=True)
        for stale in folder.glob(".*.tmp"):  # of a process that was killed while writing
            stale.unlink()
        write_atomic(path, lambda file: _save(content, file))
        write_atomic(folder / LAST, lambda file: file.write(f"{path.name}\n".encode()))
    except OSError as error:
        reason = (
            "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else str(error)
        )
        pointer = folder / LAST
        good = (
            f"the last good one is {folder / pointer.read_text().strip()}"
            if pointer.exists()
            else "there is none"
        )
        raise RunFailed(
            f"checkpoint of step {step}: {reason}; {good}; make room and resume with ckpt_path"
        ) from error
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        old.unlink(missing_ok=True)
    return path


def _save(content: dict[str, Any], file: IO[bytes]) -> None:
    # torch's writer turns a failed write into an error of its own that no longer says why
    watched = _Watched(file)
    try:
        torch.save({"format": FORMAT, **content}, watched)
    except RuntimeError as error:
        raise watched.error or error from error


class _Watched:
    """A binary file that remembers why a write failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.error = file, None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def find_checkpoint(path: str | Path, field: str = "ckpt_path") -> Path:
    """The checkpoint file that a run folder, a checkpoints folder, a `last` pointer or a file stands for.

    Raises:
        ValueError: there is none; ``field`` names the option to mend.
    """
    given = Path(path)
    for pointer in (given / FOLDER / LAST, given / LAST, given):
        if pointer.name == LAST and pointer.is_file():
            return pointer.parent / pointer.read_text().strip()
    if given.is_file():
        return given
    what = "holds no complete checkpoint" if given.is_dir() else "does not exist"
    raise ValueError(f"{field}: {str(path)!r} {what}; give a run folder or a file of its {FOLDER}/")


def read_checkpoint(path: str | Path, field: str = "ckpt_path") -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        ValueError: no such file, or it is truncated or something else than a checkpoint of this library.
    """
    file = find_checkpoint(path, field)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{field}: {str(file)!r} does not exist") from None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{field}: {str(file)!r} is truncated or no checkpoint of plain tensors; use another file"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not set(KEYS) <= set(content):
        raise ValueError(f"{field}: {str(file)!r} is not a checkpoint of attnzoo (format {FORMAT})")
    return content


def load_weights(model: nn.Module, checkpoint: Mapping[str, Any], field: str = "ckpt_path") -> None:
    """Put the checkpoint's weights into ``model``.

    Raises:
        ValueError: it is of another architecture; the message says what differs.
    """
    here, there = model.state_dict(), checkpoint["model"]
    shapes = [
        f"{name} is {list(there[name].shape)} there and {list(here[name].shape)} here"
        for name in here
        if name in there and here[name].shape != there[name].shape
    ]
    lacking = [f"{name} is only here" for name in here if name not in there]
    surplus = [f"{name} is only there" for name in there if name not in here]
    weights = shapes + lacking + surplus
    if weights:
        different = differences(checkpoint["model_config"], getattr(model, "config", {}))
        more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
        raise ValueError(f"{field}: of another architecture: {'; '.join([*different, weights[0]])}{more}")
    model.load_state_dict(there)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The entries in which a checkpoint's record and this run's differ, in words."""
    keys = sorted(set(there) | set(here))
    return [
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        for key in keys
        if there.get(key) != here.get(key)
    ]


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, Any]:
    """The model, ready to generate, and the tokenizer of a run folder or of one of its checkpoints.

    Raises:
        ValueError: no complete checkpoint, no tokenizer beside it, or one with another vocabulary.
    """
    from attnzoo import create_model
    from attnzoo.data import load_tokenizer

    file = find_checkpoint(path, "checkpoint")
    checkpoint = read_checkpoint(file, "checkpoint")
    folder = file.parent.parent / "tokenizer"
    if not folder.is_dir():
        raise ValueError(
            f"checkpoint: {str(file)!r} has no tokenizer at {str(folder)!r}; keep the run folder together"
        )
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, checkpoint, "checkpoint")
    model = create_model(**checkpoint["model_config"])
    load_weights(model, checkpoint, "checkpoint")
    return model.to(device).eval(), tokenizer


def check_vocabulary(tokenizer: Any, checkpoint: Mapping[str, Any], field: str) -> None:
    """Raise a ValueError unless the checkpoint was trained with this tokenizer."""
    saved = checkpoint["tokenizer"]
    if saved["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(
            f"{field}: its vocabulary is another: {saved['vocab_size']} tokens ({saved['fingerprint'][:8]}) "
            f"there, {tokenizer.vocab_size} ({tokenizer.fingerprint[:8]}) here; "
            "use the tokenizer that is saved in its run folder"
        )
