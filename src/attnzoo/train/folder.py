"""The run folder: one run each, and what it says about itself."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import attnzoo
from attnzoo.train.hardware import device_name
from attnzoo.train.store import FOLDER, LAST, newest_intact, step_of, write_atomic

RUN_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "environment.json", FOLDER)
PACKAGES = ("torch", "lightning", "hydra-core", "numpy", "datasets", "tokenizers", "triton")


def check_folder(folder: Path, resume_from: Path | None) -> None:
    """Raise a ValueError unless a run may start, or go on from ``resume_from``, in ``folder``."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"hydra.run.dir: {str(folder)!r} is a file; give a folder")
    if not any((folder / name).exists() for name in RUN_FILES):
        return
    if resume_from is None or resume_from.parent.resolve() != (folder / FOLDER).resolve():
        raise ValueError(
            f"hydra.run.dir: {str(folder)!r} holds another run; give a new folder, or go on with it by "
            f"ckpt_path={folder}"
        )
    pointer = folder / FOLDER / LAST
    if pointer.is_file() and pointer.read_text(errors="replace").strip() == resume_from.name:
        return
    newest = newest_intact(folder / FOLDER)  # what is damaged is no reason to keep out of the folder
    if newest is not None and step_of(newest) > step_of(resume_from):
        raise ValueError(
            f"hydra.run.dir: {str(folder)!r} is already at {newest.stem}; to go back to {resume_from.stem} "
            "give a new folder"
        )


def lacks_summary(
    folder: Path, checkpoint: Mapping[str, Any], total_steps: int | None, max_seconds: float | None
) -> bool:
    """Whether ``checkpoint`` is the last one of a run of this length, and ``folder`` does not say it yet.

    It then holds all that the summary needs: its last report, validation included.
    """
    progress, metrics = checkpoint["progress"], checkpoint.get("metrics", {})
    if metrics.get("step") != progress["step"] or "val_loss" not in metrics:
        return False
    schedule = checkpoint["schedule"]
    if (schedule["total_steps"], schedule["max_seconds"]) != (total_steps, max_seconds):
        return False
    over = progress["step"] == total_steps or (max_seconds and progress["seconds"] >= max_seconds)
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        summary = {}
    written = summary.get("status") == "completed" and summary.get("steps") == progress["step"]
    return bool(over) and not written


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed here."""
    found = {"attnzoo": attnzoo.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment(model: nn.Module, device: torch.device, **more: Any) -> dict[str, Any]:
    """What a result depends on besides the configuration."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": device_name(device),
        "impl": {f"layer {i} {mixer.name}": mixer.impl for i, mixer in enumerate(model.mixers)},
        **more,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` completely or not at all."""
    write_atomic(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))
