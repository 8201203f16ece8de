"""`attnzoo convert`."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from attnzoo import load
from attnzoo.cli.zoo import table
from attnzoo.convert import convert
from attnzoo.data import build_data
from attnzoo.train.checkpoint import find_checkpoint, read_checkpoint
from attnzoo.train.folder import check_folder
from attnzoo.train.store import FOLDER, save_checkpoint


def convert_command(options: argparse.Namespace) -> int:
    """Convert a run's model, write it as a new folder, and print what changed.

    Activations are read on samples of the run's training text; the loss before and after is measured on its
    held-out text.
    """
    source, out = Path(options.run), Path(options.out)
    given = _options(options.option)
    check_folder(out, None)
    model, tokenizer = load(source)
    checkpoint = read_checkpoint(source, "run")
    folder = find_checkpoint(source, "run").parent.parent
    calibration, held_out = text_of(folder, options.samples)
    new, report = convert(model, options.method, calibration, held_out, **given)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / "tokenizer")
    save_checkpoint(
        out / FOLDER,
        0,
        {
            "model": new.state_dict(),
            "model_config": dict(new.config),
            "optimizer": {},
            "progress": {"step": 0, "tokens": 0, "seconds": 0.0},
            **{key: checkpoint[key] for key in ("tokenizer", "identity")},
        },
        keep=1,
    )
    shutil.copyfile(folder / "config.yaml", out / "source.yaml")
    (out / "convert.json").write_text(json.dumps({"source": folder.name, **asdict(report)}, indent=2) + "\n")
    change = f"{report.logit_change:.3g}"
    print(
        table(
            [
                ["", "before", "after"],
                ["cache bytes/token", *(f"{n:,.0f}" for n in report.cache_bytes)],
                ["parameters", *(f"{n:,}" for n in report.params)],
                ["held-out nats/token", *(f"{x:.4f}" for x in report.loss)],
                ["relative change of weights", "", f"{report.weight_error:.3g}"],
                ["largest change of a logit", "", change],
            ]
        )
    )
    print(f"\n{out}; go on with: attnzoo train init_from={out} model.layout=init_from")
    return 0


def _options(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` arguments, the values read as YAML."""
    given = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"option: must be key=value, got {pair!r}")
        given[key] = yaml.safe_load(value)
    return given


def text_of(folder: Path, samples: int) -> tuple[Tensor, Tensor]:
    """Calibration and held-out tokens ``(N, T + 1)`` of the run's own data."""
    if samples < 1:
        raise ValueError(f"--samples: must be at least 1, got {samples}")
    file = folder / "config.yaml"
    if not file.exists():
        raise ValueError(f"run: {str(folder)!r} has no config.yaml, which names its text; give a run folder")
    config = yaml.safe_load(file.read_text())
    corpus = build_data(config["data"], config["tokenizer"], config["seed"])
    held_out = corpus.validation()
    return (
        torch.stack([corpus.sample(n)["tokens"][:-1] for n in range(samples)]),
        torch.stack([held_out[i]["tokens"] for i in range(min(len(held_out), 4 * samples))]),
    )
