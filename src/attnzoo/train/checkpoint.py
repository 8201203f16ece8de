"""Checkpoints as they are read: plain tensors and values, verified, without running any pickled code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnzoo.train.export import is_export, read_export
from attnzoo.train.sharded import is_sharded, read_sharded
from attnzoo.train.store import FOLDER, FORMAT, LAST, NAME, damage, newest_intact

# format 1 lacks the states of random generators, which no layer of ours needs, and what only informs
FORMATS = (1, FORMAT)
KEYS = ("model", "model_config", "tokenizer", "identity", "optimizer", "progress")


def find_checkpoint(path: str | Path, field: str = "ckpt_path") -> Path:
    """The checkpoint that a run folder, a checkpoints folder, a `last` pointer or its own name stands for.

    Raises:
        ValueError: there is none; ``field`` names the option to mend.
    """
    given = Path(path)
    for pointer in (given / FOLDER / LAST, given / LAST, given):
        if pointer.name == LAST and pointer.is_file():
            name = pointer.read_text(errors="replace").strip()
            if not NAME.fullmatch(name):
                raise ValueError(f"{field}: {str(pointer)!r} is damaged; {_way_out(pointer, field)}")
            return pointer.parent / name
    if given.is_file() or is_export(given) or is_sharded(given):
        return given
    what = "holds no complete checkpoint" if given.is_dir() else "does not exist"
    raise ValueError(f"{field}: {str(path)!r} {what}; give a run folder or a file of its {FOLDER}/")


def read_checkpoint(path: str | Path, field: str = "ckpt_path") -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; its tensors stay in the file until they are read.

    Raises:
        ValueError: no such file, or it is damaged, or something else than a checkpoint of this library. The
            message names the newest intact one beside it; nothing is read instead of what was asked for.
    """
    file = find_checkpoint(path, field)
    if is_export(file):
        return read_export(file, field)
    reason = damage(file)
    if reason is None:
        try:
            content = read_sharded(file) if is_sharded(file) else _load(file)
        except (RuntimeError, EOFError, OSError, KeyError, pickle.UnpicklingError):
            reason = "is truncated or no checkpoint of plain tensors"
    if reason:
        raise ValueError(f"{field}: {str(file)!r} {reason}; {_way_out(file, field)}")
    known = isinstance(content, dict) and content.get("format") in FORMATS and set(KEYS) <= set(content)
    if not known:
        raise ValueError(f"{field}: {str(file)!r} is not a checkpoint of attnzoo (formats {FORMATS})")
    return content


def _load(file: Path) -> Any:
    # mapped, so that the ranks of a node share it, and what is not asked for is not read
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _way_out(file: Path, field: str) -> str:
    other = newest_intact(file.parent, without=[file])
    if other is None:
        return "there is no intact one beside it; use another run or start a new one"
    more = f" hydra.run.dir={other.parent.parent}" if field == "ckpt_path" else ""
    return f"the newest intact one beside it is {str(other)!r}: give {field}={other}{more}"


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
    """The model, ready to generate, and the tokenizer of a run folder, a checkpoint or an export.

    Raises:
        ValueError: no complete checkpoint, no tokenizer beside it, or one with another vocabulary.
    """
    from attnzoo import create_model
    from attnzoo.data import load_tokenizer

    file = find_checkpoint(path, "checkpoint")
    checkpoint = read_checkpoint(file, "checkpoint")
    folder = (file if is_export(file) else file.parent.parent) / "tokenizer"
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
