"""What a sweep consists of, on disk as manifest.json of its folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from attnzoo.train.folder import write_json

FORMAT = 1
FILE = "manifest.json"
JOBS = "jobs.json"  # of SLURM, by cell id
ROOT = Path("runs")
RUN, TUNE = "run", "tune"
SEED, RATE = "seed", "optim.lr"
# where and how a run happens, not what comes out of it
ASIDE = ("run_dir", "ckpt_path", "launcher", "logger", "callbacks", "allow_targets")
ASIDE_OF = {
    "data": ("cache_dir", "num_workers", "worker_timeout"),
    "trainer": ("decode_tokens", "sample_prompt", "sample_tokens"),
}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Args:
        id: readable and stable: of the arm, the seed and a hash of the configuration.
        stage: "run", or "tune" for a run of the learning-rate search.
        arm, setting: labels: what is compared, and what all arms share but is itself swept.
        overrides: of the command line, as `attnzoo train` takes them.
        config: the resolved configuration; the logger's folder still refers to ``run_dir``.
        matched: how the arm was brought to the baseline's budget, or None.
    """

    id: str
    stage: str
    arm: str
    setting: str
    seed: int
    overrides: tuple[str, ...]
    config: Mapping[str, Any] = field(hash=False)
    matched: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def group(self) -> tuple[str, str]:
        """Arm and setting."""
        return self.arm, self.setting


@dataclass(frozen=True)
class Manifest:
    """A sweep.

    Args:
        folder: where it lies; not part of the file, so the folder can be moved.
        cwd: where it was started: relative paths of its configurations are meant from there.
        command: the arguments as given.
        baseline: label of the arm that others are compared with, or None.
        match: ``{"budget", "by", "tolerance"}`` or None.
        tune: ``{"lr": [...], "seed", "runs": [...]}`` or None; ``runs`` are the cells to come, without a
            learning rate.
        launcher: ``{"name": "local" | "slurm", "jobs": int or None}``.
    """

    folder: Path
    name: str
    created: str
    cwd: str
    command: tuple[str, ...]
    baseline: str | None
    match: Mapping[str, Any] | None
    tune: Mapping[str, Any] | None
    launcher: Mapping[str, Any]
    cells: tuple[Cell, ...]

    def run_folder(self, cell: Cell) -> Path:
        """The cell's run folder."""
        return self.folder / "cells" / cell.id

    def outcome_file(self, cell: Cell) -> Path:
        """What happened to the cell's last attempt."""
        return self.folder / "cells" / f"{cell.id}.json"

    def lock_file(self, cell: Cell) -> Path:
        """Held by the process that trains the cell."""
        return self.folder / "cells" / f"{cell.id}.lock"

    def log_file(self, cell: Cell) -> Path:
        """Output of the cell's attempts."""
        return self.folder / "logs" / f"{cell.id}.log"

    @property
    def searching(self) -> bool:
        """Whether the learning-rate search is all that there is so far."""
        return all(cell.stage == TUNE for cell in self.cells)

    def cell(self, name: str) -> Cell:
        """The cell with this id; KeyError where there is none."""
        return next(cell for cell in self.cells if cell.id == name)


def cell_id(arm: str, seed: int, config: Mapping[str, Any], stage: str = RUN) -> str:
    """The same for the same configuration, in any process and order of axes."""
    kept = {key: value for key, value in config.items() if key not in ASIDE}
    for group, names in ASIDE_OF.items():
        kept[group] = {key: value for key, value in kept[group].items() if key not in names}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]
    slug = re.sub(r"[^A-Za-z0-9_.]+", "-", arm).strip("-.")[:48]
    return "-".join([*([TUNE] if stage == TUNE else []), slug, f"s{seed}", digest])


def with_id(cell: Cell) -> Cell:
    """The cell with the id that its configuration gives."""
    return replace(cell, id=cell_id(cell.arm, cell.seed, cell.config, cell.stage))


def write_manifest(manifest: Manifest) -> None:
    """Write manifest.json completely or not at all."""
    manifest.folder.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, **asdict(manifest)}
    del content["folder"]
    write_json(manifest.folder / FILE, content)


def read_manifest(folder: str | Path) -> Manifest:
    """The sweep in ``folder``.

    Raises:
        ValueError: none is there, or its file is damaged or of another format.
    """
    file = Path(folder) / FILE
    try:
        content = json.loads(file.read_text())
        if content.pop("format") != FORMAT:
            raise ValueError
        cells = tuple(as_cell(cell) for cell in content.pop("cells"))
        content["command"] = tuple(content["command"])
        manifest = Manifest(folder=Path(folder), cells=cells, **content)
    except FileNotFoundError:
        raise ValueError(f"sweep: {str(folder)!r} holds no {FILE}; give the folder of a sweep") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"sweep: {str(file)!r} is damaged or not of format {FORMAT}") from None
    _check_names(manifest)
    return manifest


def _check_names(manifest: Manifest) -> None:
    """A sweep from elsewhere must not write outside its folder: its names become parts of paths."""
    names = [manifest.name, *(cell.id for cell in manifest.cells)]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ValueError(f"sweep: names in {FILE} must be letters, digits and ._-, got {name!r}")
    if len(set(names[1:])) < len(names) - 1:
        raise ValueError(f"sweep: cells in {FILE} must have names of their own, got one twice")


def as_cell(content: Mapping[str, Any]) -> Cell:
    """A cell from its JSON."""
    return Cell(**(dict(content) | {"overrides": tuple(content["overrides"])}))
