"""Run folders as a finished run leaves them, made up with any value, and what `compare` makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from attnzoo.compare.comparison import compare
from attnzoo.compare.select import from_folders
from attnzoo.compare.statistics import Method

EDGES = [0, 1, 2, 4, 8, 16, 32]
LOSSES = [3.0, 2.5, 2.0, 1.8, 1.6, 1.5]
MHA, MLA = [2.0, 2.02, 1.99], [1.9, 1.93, 1.885]  # bits per byte by seed, clearly apart


def run_folder(
    folder: Path,
    variant: str = "mha",
    seed: int = 1,
    bpb: float | None = 2.0,
    *,
    attention: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    **summary: Any,
) -> Path:
    """Write a run folder and return it.

    Args:
        bpb: validation bits per byte. attention: options of the variant. config: dotted keys to set.
        environment, summary: entries to set.
    """
    folder.mkdir(parents=True)
    settings = OmegaConf.create(
        {
            "seed": seed,
            "run_dir": str(folder),
            "ckpt_path": None,
            "attention": {"name": variant, **(attention or {})},
            "data": {"name": "text", "seq_len": 32, "batch_size": 4, "val_samples": 8, "val_fraction": 0.2},
            "tokenizer": {"name": "bytes"},
            "model": {"layout": None, "dim": 16, "depth": 2, "num_heads": 2, "mlp_hidden": None},
            "optim": {"lr": 0.002},
            "trainer": {"max_steps": 4, "log_every": 1},
            "logger": {"jsonl": {"folder": str(folder)}},
        }
    )
    for key, value in (config or {}).items():
        OmegaConf.update(settings, key, value)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(settings))
    _write(folder / "environment.json", {
        "versions": {"torch": "2.10"}, "device": "cpu (x)", "precision": "32-true (requested)", "ranks": 1,
        "data_fingerprint": "d" * 32, "tokenizer_fingerprint": "bytes", **(environment or {}),
    })  # fmt: skip
    whole = {
        "variant": variant, "seed": seed, "status": "completed", "params": 1000, "tokens": 512, "steps": 4,
        "train_loss": 1.5, "val_loss": None if bpb is None else bpb * 0.7, "val_bpb": bpb,
        "val_accuracy": None, "tokens_per_second": 100.0 + seed, "seconds": 5.0 + seed,
        "peak_memory_bytes": 10**8 + seed, "val_measures": "negative log-likelihood",
        "train_flops_per_token": 6000.0, "cache_bytes_per_token": 128, "state_bytes": 64, "seq_len": 32,
        "val_loss_by_position": {"edges": EDGES, "loss": LOSSES},
        "decode": {"context": [8, 16, 32], "ms_per_token": [1.0, 2.0, 3.0], "cache_bytes": [1, 2, 3]},
        **summary,
    }  # fmt: skip
    _write(folder / "summary.json", whole)
    lines = [
        {"step": i, "tokens": 128 * i, "seconds": 0.5 * i, "train_loss": 3.0 - 0.3 * i} for i in range(1, 5)
    ]
    for key in ("val_loss", "val_bpb", "val_accuracy"):
        if whole[key] is not None:
            lines[-1][key] = whole[key]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content))


def task_folder(folder: Path, name: str, variant: str, seed: int, accuracy: float, **config: Any) -> Path:
    """A run of a synthetic task, with dotted keys of its configuration."""
    config = {"data.name": f"synthetic/{name}", **config}
    return run_folder(
        folder / f"{name}-{variant}-{seed}-{len(config)}", variant, seed, None, val_accuracy=accuracy,
        config=config, environment={"data_fingerprint": name}, val_loss=1.0 - accuracy,
    )  # fmt: skip


def arms(folder: Path, **values: list[float]) -> list[Path]:
    """Runs of seeds 1, 2, ... per variant, with these bits per byte."""
    return [
        run_folder(folder / f"{name}-{seed}", name, seed, bpb)
        for name, every in values.items()
        for seed, bpb in enumerate(every, 1)
    ]


def compared(*folders: Path, method: Method | None = None, **options: Any) -> dict[str, Any]:
    """The comparison of some folders, which must be JSON."""
    found = compare(from_folders(folders), method or Method(), **options)
    json.dumps(found, allow_nan=False)
    return found


def result(found: dict[str, Any], arm: str, metric: str = "val_bpb", setting: int = 0) -> dict[str, Any]:
    """One row of the results."""
    (row,) = (r for r in found["settings"][setting]["results"] if (r["arm"], r["metric"]) == (arm, metric))
    return row
