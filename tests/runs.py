"""Tiny training runs for the tests: a text of a few kilobytes, a model of a few thousand parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from attnzoo.cli.overrides import order
from attnzoo.cli.train import config_folder
from attnzoo.train.prepare import Run, prepare
from attnzoo.train.run import execute

TINY = (
    "model=debug",
    "model.dim=16",
    "model.depth=2",
    "model.num_heads=2",
    "attention=mha",
    "data=text",
    "data.seq_len=32",
    "data.batch_size=4",
    "data.val_samples=8",
    "data.val_fraction=0.2",
    "trainer.precision=fp32",
    "trainer.max_steps=4",
    "trainer.log_every=1",
    "trainer.sample_tokens=0",
)


def write_text(folder: Path) -> Path:
    """Some files of Python-like lines, with characters of more than one byte."""
    text = folder / "text"
    if not text.exists():
        text.mkdir(parents=True)
        for i in range(60):
            lines = (f"def naïve_{i}_{j}(x):\n    return x * {i * j} + '→'\n" for j in range(1 + i % 3))
            (text / f"{i}.txt").write_text("".join(lines), encoding="utf-8")
    return text


def overrides(folder: Path, *more: str) -> list[str]:
    """The overrides of a tiny run whose text and cache lie in ``folder``."""
    return [*TINY, f"data.path={write_text(folder)}", f"data.cache_dir={folder / 'cache'}", *more]


def compose(folder: Path, *more: str, name: str = "run") -> DictConfig:
    """The configuration of a tiny run in ``folder / name``."""
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("config", order(overrides(folder, f"run_dir={folder / name}", *more)))


def train(folder: Path, *more: str, name: str = "run") -> tuple[Run, dict[str, Any]]:
    """Train a tiny run; returns it and its summary."""
    run = prepare(compose(folder, *more, name=name))
    return run, execute(run)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics_so_far(folder: Path) -> list[dict[str, Any]]:
    """The same of a run that goes on, which may be amid a line, or has written none."""
    file = folder / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
