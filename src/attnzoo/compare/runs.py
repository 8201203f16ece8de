"""What a finished run left in its folder; reading writes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

NEEDED = ("variant", "seed", "status", "params", "tokens", "steps", "seq_len")


@dataclass(frozen=True)
class Run:
    """A completed run.

    Args:
        config: its resolved configuration. summary, environment: as the run wrote them.
        metrics: the lines of metrics.jsonl, in order.
    """

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def seed(self) -> int:
        return self.summary["seed"]


@dataclass(frozen=True)
class LeftOut:
    """A folder that cannot take part, and why."""

    folder: Path
    reason: str


def read_runs(folders: Iterable[Path]) -> tuple[list[Run], list[LeftOut]]:
    """The usable runs among ``folders``, each folder once, and the others with the reason."""
    runs, left_out, seen = [], [], set()
    for folder in folders:
        if (place := folder.resolve()) in seen:
            continue
        seen.add(place)
        try:
            runs.append(read_run(folder))
        except ValueError as error:
            left_out.append(LeftOut(folder, str(error)))
    return runs, left_out


def read_run(folder: Path) -> Run:
    """The completed run in ``folder``.

    Raises:
        ValueError: there is none; the message is the reason alone, without the folder.
    """
    if not folder.is_dir():
        raise ValueError("is not a folder" if folder.exists() else "does not exist")
    if not any((folder / name).exists() for name in ("config.yaml", "summary.json")):
        raise ValueError("is not a run folder")
    if not (folder / "summary.json").exists():
        raise ValueError("summary.json is missing: the run has not ended, or was killed")
    summary = _object(folder / "summary.json")
    if summary.get("status") != "completed":
        error = f": {summary['error']}" if summary.get("error") else ""
        raise ValueError(f"the run is {summary.get('status')}{error}")
    if missing := [key for key in NEEDED if summary.get(key) is None]:
        raise ValueError(f"summary.json has no {', '.join(missing)}")
    return Run(
        folder, _config(folder / "config.yaml"), summary, _object(folder / "environment.json"), _lines(folder)
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None


def _object(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is cut off or not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content


def _lines(folder: Path) -> list[dict[str, Any]]:
    lines = []
    for number, line in enumerate(_text(folder / "metrics.jsonl").splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            raise ValueError(f"metrics.jsonl is cut off or not JSON in line {number}") from None
        if not isinstance(lines[-1], dict):
            raise ValueError(f"metrics.jsonl holds no JSON object in line {number}")
    if not lines:
        raise ValueError("metrics.jsonl is empty")
    return lines


def _config(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        # as it stands: a run writes it resolved, and another's may ask for our environment
        content = OmegaConf.to_container(OmegaConf.create(text))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"config.yaml cannot be read: {str(error).splitlines()[0]}") from None
    groups = ("attention", "data", "model")
    if not isinstance(content, dict) or not all(isinstance(content.get(group), dict) for group in groups):
        raise ValueError(f"config.yaml lacks one of the groups {', '.join(groups)}")
    return content
