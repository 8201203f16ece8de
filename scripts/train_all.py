"""Trains every variant for the same 300 steps on the default data and writes what each learned.

    python scripts/train_all.py                              # all variants; finished runs are not repeated
    python scripts/train_all.py --variants 'm?a' --steps 20 --out /tmp/runs --csv /tmp/all.csv

Each run is a process of its own, on one core, in a run folder under ``--out``; as many run at once as there
are cores. The table goes to benchmarks/results/train-all.csv: bits per byte on unseen text, beside those of a
byte unigram model; how many bits fewer than a bigram model of the training text it needs at the first
position of a sample, where both know one token, and at late ones, which shows whether the context is used;
and the largest gradient norm. The script fails where a variant is not clearly below the unigram model or late
positions gain no more than the first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jobs
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import attnzoo

ROOT = pathlib.Path(__file__).parents[1]
CSV = ROOT / "benchmarks" / "results" / "train-all.csv"
SAME = (
    "model=debug", "data.seq_len=128", "data.batch_size=16", "optim.lr=3e-3",
    "trainer.val_every=null", "trainer.sample_tokens=0",
)  # fmt: skip
LATE = slice(64, 128)  # positions of a sample
MARGIN, GAIN = 0.95, 0.1  # of the unigram model's bits; bits that late positions must gain beyond the first


def train(name: str, folder: pathlib.Path, steps: int) -> dict[str, Any]:
    """The summary of one run, trained now unless it stands complete in ``folder``."""
    start = time.perf_counter()
    summary, trained = jobs.train([f"attention={name}", f"trainer.max_steps={steps}", *SAME], folder)
    if trained and "error" not in summary:
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return {"variant": name} | summary


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


def counted_bits(corpus: Any) -> tuple[float, Tensor]:
    """Bits per byte of a unigram model of the training text; bits per token ``(T,)`` of a bigram model, by
    position.
    """
    size, text = corpus.tokenizer.vocab_size, torch.from_numpy(corpus.train.read(0, len(corpus.train)).tokens)
    unigram = torch.bincount(text, minlength=size) + 1.0
    unigram = unigram / unigram.sum()
    pairs = torch.bincount(text[:-1] * size + text[1:], minlength=size**2).view(size, size).float()
    bigram = (pairs + 2 * unigram) / (pairs.sum(1, keepdim=True) + 2)
    samples = corpus.validation()
    tokens = torch.stack([samples[i]["tokens"] for i in range(len(samples))])
    bytes_ = sum(int(samples[i]["target_bytes"]) for i in range(len(samples)))
    alone = float(-unigram.log2()[tokens[:, 1:]].sum()) / bytes_
    return alone, -bigram.log2()[tokens[:, :-1], tokens[:, 1:]].mean(0)


def row_of(
    summary: dict[str, Any], folder: pathlib.Path, corpus: Any, unigram: float, bigram: Tensor
) -> dict[str, Any]:
    """One line of the table."""
    if "error" in summary:
        return {"variant": summary["variant"], "verdict": f"failed: {summary['error']}"}
    row = {key: summary[key] for key in ("variant", "steps", "tokens", "params", "train_flops_per_token")}
    row |= {"train_loss": round(summary["train_loss"], 4), "val_bpb": round(summary["val_bpb"], 4)}
    problems = [] if summary["val_bpb"] < MARGIN * unigram else ["not clearly below unigram"]
    row["unigram_bpb"] = round(unigram, 4)
    if summary.get("objective", "next_token") == "next_token":
        gain = bigram - bits_by_position(folder, corpus)
        first, late = float(gain[0]), float(gain[LATE].mean())
        row |= {"gain_first": round(first, 3), "gain_late": round(late, 3)}
        if late < first + GAIN:
            problems.append("context not used")
    with (folder / "metrics.jsonl").open() as file:
        row["largest_grad_norm"] = f"{max(json.loads(line)['grad_norm'] for line in file):.3g}"
    return row | {"verdict": "; ".join(problems) or "learns"}


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
    unigram, bigram = counted_bits(corpus)
    rows = [
        row_of(summary, options.out / name, corpus, unigram, bigram)
        for name, summary in zip(names, summaries, strict=True)
    ]
    rows = [row | jobs.one_core() for row in sorted(rows, key=lambda row: row.get("val_bpb", math.inf))]
    jobs.save(rows, options.csv)
    bad = [row for row in rows if row["verdict"] != "learns"]
    for row in bad:
        print(f"{row['variant']}: {row['verdict']}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
