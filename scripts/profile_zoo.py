"""Trains one small model per variant, synthetic task and seed, and writes what each can do.

    python scripts/profile_zoo.py                                        # the committed table
    python scripts/profile_zoo.py --tasks all --seeds 1 --csv /tmp/all.csv
    python scripts/profile_zoo.py --variants 'mha,kda' --tasks mqar,s5 --csv /tmp/two.csv

Each run is the training job with experiment=profile, in a process and on a core of its own, in a run folder
under ``--out``; finished runs are not repeated, so the script goes on where it was stopped. The table has one
line per run; accuracy is the share of the answers that are right, on samples never trained on. Then the known
directions are checked (`EXPECTED`), and what did not come out is printed as "not met".
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jobs

from attnzoo.data.synthetic import TASKS

ROOT = pathlib.Path(__file__).parents[1]
CSV = ROOT / "benchmarks" / "results" / "profile.csv"
VARIANTS = ("mha", "sliding_window", "linear", "mamba2", "deltanet", "gated_deltanet")
# windows and states are small beside the tasks, as they are beside the texts of large models; deltanet's
# state may change sign, the others' not
OPTIONS = {
    "sliding_window": ("window=8", "n_sink=0"),
    "mamba2": ("state_size=16",),
    "deltanet": ("allow_neg_eigval=true",),
}
SOLVED, FAILED, AHEAD = 0.95, 0.8, 0.05
Accuracy = Mapping[tuple[str, str], float]  # by (variant, task), mean over seeds


@dataclass(frozen=True)
class Cell:
    """One run."""

    variant: str
    task: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.task}-s{self.seed}"


def train(cell: Cell, out: pathlib.Path) -> dict[str, Any]:
    """The summary of a run, trained now unless it stands complete in ``out``."""
    overrides = ["experiment=profile", f"data=synthetic/{cell.task}", f"attention={cell.variant}"]
    overrides += [f"attention.{option}" for option in OPTIONS.get(cell.variant, ())]
    summary, trained = jobs.train([*overrides, f"seed={cell.seed}"], out / cell.name)
    if trained and "error" not in summary:
        print(f"{cell.name}: {summary['val_accuracy']:.1%} in {summary['seconds']:.0f} s", flush=True)
    return summary


def row_of(cell: Cell, summary: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    row = {"variant": cell.variant, "options": " ".join(OPTIONS.get(cell.variant, ()))}
    row |= {"task": cell.task, "seed": cell.seed}
    if "error" in summary:
        return row | {"error": summary["error"]}
    row |= {"accuracy": round(summary["val_accuracy"], 4), "loss": round(summary["val_loss"], 4)}
    return row | {
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "params": summary["params"],
        "state_bytes": summary["state_bytes"],
        "cache_bytes_per_token": summary["cache_bytes_per_token"],
        "seconds": round(summary["seconds"], 1),
        **jobs.one_core(),
    }


def solves(variant: str, task: str) -> tuple[str, list[str], Callable[[Accuracy], bool]]:
    text = f"{variant} solves {task} (at least {SOLVED:.0%})"
    return text, [f"{variant}/{task}"], lambda found: found[variant, task] >= SOLVED


def fails(variant: str, task: str) -> tuple[str, list[str], Callable[[Accuracy], bool]]:
    text = f"{variant} fails {task} (under {FAILED:.0%})"
    return text, [f"{variant}/{task}"], lambda found: found[variant, task] < FAILED


def beats(variant: str, other: str, task: str) -> tuple[str, list[str], Callable[[Accuracy], bool]]:
    text = f"{variant} is ahead of {other} on {task} (by {AHEAD:.0%})"
    needs = [f"{variant}/{task}", f"{other}/{task}"]
    return text, needs, lambda found: found[variant, task] >= found[other, task] + AHEAD


# reported in Zoology 2312.04927 (recall) and in 2411.12537 (negative eigenvalues, parity and state tracking)
EXPECTED = (
    solves("mha", "mqar"),
    fails("linear", "mqar"),
    fails("sliding_window", "mqar"),
    beats("deltanet", "linear", "mqar"),
    beats("gated_deltanet", "linear", "mqar"),
    solves("mha", "induction"),
    beats("deltanet", "linear", "induction"),
    fails("linear", "parity"),
    fails("mamba2", "parity"),
    fails("gated_deltanet", "parity"),
    solves("deltanet", "parity"),
    beats("deltanet", "linear", "parity"),
    fails("linear", "s3"),
    solves("deltanet", "s3"),
    beats("deltanet", "mha", "s3"),
)


def report(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Print the profile and the expectations; returns those that were not met."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if "accuracy" in row:
            found.setdefault((row["variant"], row["task"]), []).append(row["accuracy"])
    mean = {key: statistics.mean(values) for key, values in found.items()}
    variants, tasks = (list(dict.fromkeys(key[i] for key in mean)) for i in (0, 1))
    print("\naccuracy, mean over seeds (least - most)")
    print("".ljust(16) + "".join(task.rjust(22) for task in tasks))
    for variant in variants:
        cells = (found.get((variant, task)) for task in tasks)
        texts = (f"{statistics.mean(c):.3f} ({min(c):.3f}-{max(c):.3f})" if c else "-" for c in cells)
        print(variant.ljust(16) + "".join(text.rjust(22) for text in texts))
    print()
    missed = []
    for text, needs, met in EXPECTED:
        if all(tuple(need.split("/")) in mean for need in needs):
            values = ", ".join(f"{need} {mean[tuple(need.split('/'))]:.3f}" for need in needs)
            verdict = "met" if met(mean) else "not met"
            print(f"{verdict:8} {text}: {values}")
            missed += [text] if verdict == "not met" else []
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names with commas")
    parser.add_argument("--tasks", default="mqar,induction,parity,s3", help='names with commas, or "all"')
    parser.add_argument("--seeds", default="1,2", help="numbers with commas")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "profile")
    parser.add_argument("--csv", type=pathlib.Path, default=CSV)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once, a core each")
    options = parser.parse_args()
    tasks = list(TASKS) if options.tasks == "all" else options.tasks.split(",")
    cells = [
        Cell(variant, task, int(seed))
        for seed in options.seeds.split(",")
        for task in tasks
        for variant in options.variants.split(",")
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        summaries = list(pool.map(lambda cell: train(cell, options.out), cells))
    rows = [row_of(cell, summary) for cell, summary in zip(cells, summaries, strict=True)]
    jobs.save(rows, options.csv)
    missed, errors = report(rows), [row for row in rows if "error" in row]
    for row in errors:
        print(f"{row['variant']} {row['task']} seed {row['seed']}: {row['error']}", file=sys.stderr)
    return 1 if missed or errors else 0


if __name__ == "__main__":
    sys.exit(main())
