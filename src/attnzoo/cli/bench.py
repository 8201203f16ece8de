"""`attnzoo bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from attnzoo import bench
from attnzoo.bench_cases import OPS, cases
from attnzoo.cli.zoo import table

COLUMNS = ("what", "T", "d", "mode", "side", "ms", "ratio", "peak_mib", "gib_per_s", "note")


def bench_command(options: argparse.Namespace) -> int:
    """Time ops against their rivals, print the ratios and write the CSV files."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for op in options.ops:
        if op not in OPS:
            raise ValueError(f"op: must be one of {', '.join(OPS)}, got {op!r}")
    rows = []
    for op in options.ops or OPS:
        print(f"\n{op} on {bench.device_name(device)}; ratio = time of the side / time of attnzoo")
        print(table([list(COLUMNS)]))
        for case in cases(op, options.lengths, options.head_dims, device):
            new = list(bench.measure(case, options.rounds))
            print(table([[str(getattr(row, name)) for name in COLUMNS] for row in new]), flush=True)
            rows += new
    for file in bench.write(rows, Path(options.out), device):
        print(f"wrote {file}")
    return 0
