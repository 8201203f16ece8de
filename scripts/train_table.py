"""Trains every variant for the same steps on the default data and writes the table of the README.

    python scripts/train_table.py                         # all variants; finished runs are not repeated
    python scripts/train_table.py --variants mha,mla --steps 20 --out /tmp/table

Each run is a fresh process with its own run folder under ``--out``; results go to
benchmarks/results/variants.csv, and to the README between its markers.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import pathlib
import platform
import subprocess
import sys
from datetime import date

import attnzoo

ROOT = pathlib.Path(__file__).parents[1]
CSV = ROOT / "benchmarks" / "results" / "variants.csv"
MARKS = ("<!-- variants table: scripts/train_table.py -->", "<!-- end of variants table -->")
COLUMNS = {
    "variant": "variant",
    "val_bpb": "bits per byte",
    "params": "parameters",
    "train_flops_per_token": "train FLOPs/token",
    "cache_bytes_per_token": "cache bytes/token",
    "state_bytes": "state bytes",
    "tokens_per_second": "tokens/s",
}


def train(name: str, folder: pathlib.Path, overrides: list[str]) -> dict:
    """The summary of one run, trained now unless it stands complete in ``folder``."""
    summary = folder / "summary.json"
    if not (summary.exists() and json.loads(summary.read_text())["status"] == "completed"):
        command = [
            sys.executable,
            "-c",
            "import sys; from attnzoo.cli import main; sys.exit(main())",
            "train",
        ]
        subprocess.run([*command, f"attention={name}", f"hydra.run.dir={folder}", *overrides], check=True)
    return json.loads(summary.read_text())


def markdown(rows: list[dict], note: str) -> str:
    """The table as the README shows it."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    for row in rows:
        cells = [f"`{row['variant']}`", f"{row['val_bpb']:.3f}", f"{row['params'] / 1e6:.2f} M"]
        cells += [f"{row['train_flops_per_token'] / 1e6:.2f} M", f"{row['cache_bytes_per_token']:g}"]
        cells += [f"{row['state_bytes']:,}", f"{row['tokens_per_second']:,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", note])


def write(rows: list[dict], note: str) -> None:
    """The CSV, and the README's table."""
    CSV.parent.mkdir(parents=True, exist_ok=True)
    with CSV.open("w", newline="") as file:
        file.write(f"# {note}\n")
        table = csv.DictWriter(file, list(COLUMNS), extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    readme = ROOT / "README.md"
    head, rest = readme.read_text().split(MARKS[0])
    tail = rest.split(MARKS[1])[1]
    readme.write_text(f"{head}{MARKS[0]}\n{markdown(rows, note)}\n{MARKS[1]}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default=",".join(attnzoo.list_variants()))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--model", default="debug")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "variants")
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides, the same for all")
    options = parser.parse_args()
    same = [f"model={options.model}", f"trainer.max_steps={options.steps}", *options.overrides]
    rows = [train(name, options.out / name, same) for name in options.variants.split(",")]
    rows.sort(key=lambda row: row["val_bpb"])
    first = rows[0]
    note = (
        f"`model={options.model}`, {options.steps} steps, T={first['seq_len']}, {first['tokens']:,} tokens, "
        f"seed {first['seed']}, one run each: differences of a few hundredths are noise. "
        f"{platform.machine()}, {os.cpu_count()} cores, torch {first['versions']['torch']}, {date.today()}."
    )
    write(rows, note)
    print(markdown(rows, note))


if __name__ == "__main__":
    main()
