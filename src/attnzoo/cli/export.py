"""`attnzoo export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from attnzoo import load
from attnzoo.train.checkpoint import read_checkpoint
from attnzoo.train.export import WEIGHTS, write_export


def export_command(options: argparse.Namespace) -> int:
    """Write a run's weights as safetensors, with the model's configuration and the tokenizer."""
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {options.out!r} is not empty; give a new folder")
    _, tokenizer = load(options.run)  # refuses what could not be used
    checkpoint = read_checkpoint(options.run, "run")
    write_export(out, checkpoint, tokenizer)
    size = (out / WEIGHTS).stat().st_size
    print(f"{out}: {len(checkpoint['model'])} tensors, {size:,} bytes, step {checkpoint['progress']['step']}")
    return 0
