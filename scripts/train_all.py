"""Trains every variant for the same 300 steps on the default data and writes what each learned.

    python scripts/train_all.py                              # all variants; finished runs are not repeated
    python scripts/train_all.py --variants 'm?a' --steps 20 --out /tmp/runs --csv /tmp/all.csv

Each run is a process of its own, on one core, in a run folder under ``--out``; as many run at once as there
are cores. The table goes to benchmarks/results/train-all.csv: bits per byte on unseen text, beside those of a
byte unigram model, and the loss at early and late positions of a sample, which shows whether the context is
used. The script fails where a variant is not clearly below the unigram model or does not use its context.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import attnzoo

ROOT = pathlib.Path(__file__).parents[1]
CSV = ROOT / "benchmarks" / "results" / "train-all.csv"
SAME = ("model=debug", "data.seq_len=128", "trainer.val_every=null", "trainer.sample_tokens=0")
EARLY, LATE = slice(0, 8), slice(64, 128)  # positions of a sample
MARGIN, GAIN = 0.95, 0.05  # of the unigram model's bits; bits that late positions must be better by
PROGRAM = "import sys; from attnzoo.cli import main; sys.exit(main())"


def train(name: str, folder: pathlib.Path, steps: int) -> dict[str, Any]:
    """The summary of one run, trained now unless it stands complete in ``folder``."""
    summary, start = folder / "summary.json", time.perf_counter()
    if not _completed(summary):
        command = [sys.executable, "-c", PROGRAM, "train", f"attention={name}", f"hydra.run.dir={folder}"]
        log = folder.with_suffix(".log")
        with log.open("w") as file:
            code = subprocess.run(
                [*command, f"trainer.max_steps={steps}", *SAME],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if code:
            return {"variant": name, "error": log.read_text().strip().splitlines()[-1]}
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return json.loads(summary.read_text())


def _completed(summary: pathlib.Path) -> bool:
    return summary.exists() and json.loads(summary.read_text())["status"] == "completed"


def bits_by_position(folder: pathlib.Path, corpus: Any) -> Tensor:
    """``(T,)`` bits per token on the held-out samples, by position in the sample."""
    model, _ = attnzoo.load(folder)
    samples = corpus.validation()
    tokens = torch.stack([samples[i]["tokens"] for i in range(len(samples))])
    with torch.no_grad():
        nll = [
            cross_entropy(model(part[:, :-1]).mT.float(), part[:, 1:], reduction="none")
            for part in tokens.split(16)
        ]
    return torch.cat(nll).mean(0) / math.log(2)


def unigram_bits(corpus: Any) -> float:
    """Bits per byte of a model that knows only how frequent each token is in the training text."""
    size = corpus.tokenizer.vocab_size
    counts = torch.bincount(torch.from_numpy(corpus.train.tokens[:].astype("int64")), minlength=size) + 1.0
    samples = corpus.validation()
    tokens = torch.cat([samples[i]["tokens"][1:] for i in range(len(samples))])
    bytes_ = sum(int(samples[i]["target_bytes"]) for i in range(len(samples)))
    return float(-(counts / counts.sum()).log2()[tokens].sum()) / bytes_


def row_of(summary: dict[str, Any], folder: pathlib.Path, corpus: Any, unigram: float) -> dict[str, Any]:
    """One line of the table."""
    if "error" in summary:
        return {"variant": summary["variant"], "verdict": f"failed: {summary['error']}"}
    row = {key: summary[key] for key in ("variant", "steps", "tokens", "params", "train_flops_per_token")}
    row |= {"train_loss": round(summary["train_loss"], 4), "val_bpb": round(summary["val_bpb"], 4)}
    problems = [] if summary["val_bpb"] < MARGIN * unigram else ["not clearly below unigram"]
    row["unigram_bpb"] = round(unigram, 4)
    if summary.get("objective", "next_token") == "next_token":
        bits = bits_by_position(folder, corpus)
        row |= {
            "early_bits": round(float(bits[EARLY].mean()), 4),
            "late_bits": round(float(bits[LATE].mean()), 4),
        }
        if bits[LATE].mean() > bits[EARLY].mean() - GAIN:
            problems.append("context not used")
    row["tokens_per_second"] = round(summary["tokens_per_second"])
    return row | {"verdict": "; ".join(problems) or "learns"}


def save(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    machine = {
        "machine": f"{platform.machine()}, 1 of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "attnzoo": attnzoo.__version__,
        "date": datetime.date.today().isoformat(),
    }
    rows = [row | machine for row in sorted(rows, key=lambda row: row.get("val_bpb", math.inf))]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def main() -> int:
    from omegaconf import OmegaConf

    from attnzoo.data import build_data

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default="*", help="glob, or names with commas")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "train-all")
    parser.add_argument("--csv", type=pathlib.Path, default=CSV)
    options = parser.parse_args()
    names = [n for glob in options.variants.split(",") for n in attnzoo.list_variants(glob)]
    options.out.mkdir(parents=True, exist_ok=True)
    # the first run alone fills the cache of tokenised text
    summaries = [train(names[0], options.out / names[0], options.steps)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        summaries += pool.map(lambda name: train(name, options.out / name, options.steps), names[1:])
    done = next(s for s in summaries if "error" not in s)
    config = OmegaConf.to_container(OmegaConf.load(options.out / done["variant"] / "config.yaml"))
    corpus = build_data(config["data"], config["tokenizer"], config["seed"])
    unigram = unigram_bits(corpus)
    rows = [
        row_of(summary, options.out / name, corpus, unigram)
        for name, summary in zip(names, summaries, strict=True)
    ]
    save(rows, options.csv)
    bad = [row for row in rows if row["verdict"] != "learns"]
    for row in bad:
        print(f"{row['variant']}: {row['verdict']}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
