"""Converts trained models by every method and measures the loss on held-out text before any further training.

    python scripts/convert_table.py --runs runs/train-all        # needs its runs mha and mla

Writes benchmarks/results/conversions.csv: for each method and setting the cache bytes per token before and
after, the loss before and after in nats per token, the relative change of the heads' matrices, and the
largest change of a logit on calibration text.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
from pathlib import Path
from typing import Any

import torch

import attnzoo
from attnzoo.cli.convert import text_of
from attnzoo.convert import convert

ROOT = Path(__file__).parents[1]
CSV = ROOT / "benchmarks" / "results" / "conversions.csv"
# (source run, method, options, what is exact of it)
CASES: list[tuple[str, str, dict[str, Any], str]] = [
    ("mha", "gqa", {"num_kv_heads": 2}, ""),
    ("mha", "gqa", {"num_kv_heads": 2, "pooling": "first"}, ""),
    ("mha", "gqa", {"num_kv_heads": 2, "pooling": "svd"}, ""),
    ("mha", "transmla", {"kv_rank": 112}, "full rank"),
    ("mha", "transmla", {"kv_rank": 48}, ""),
    ("mha", "transmla", {"kv_rank": 48, "freqfold": 4}, ""),
    ("mha", "mha2mla", {"num_rope_pairs": 8, "kv_rank": 64}, "exact"),
    ("mha", "mha2mla", {"num_rope_pairs": 2, "kv_rank": 48}, ""),
    ("mha", "mha2mla", {"num_rope_pairs": 2, "kv_rank": 48, "strategy": "uniform"}, ""),
    ("mha", "elitekv", {"num_rope_pairs": 2, "kv_rank": 48}, ""),
    ("mha", "xecomla", {"kv_rank": 48, "q_rank": 64}, ""),
    ("mha", "dha", {"budget": 32}, "exact"),
    ("mha", "dha", {"budget": 16}, ""),
    ("mha", "tensorllm", {"rank_model": 64, "rank_head": 16}, "exact"),
    ("mha", "tensorllm", {"rank_model": 48, "rank_head": 12}, ""),
    ("mha", "tensorllm", {"rank_model": 48, "rank_head": 12, "iterate": True}, ""),
    ("mha", "headshare", {"share_rate": 0.3}, ""),
    ("mha", "masa", {"num_atoms": 4}, "exact"),
    ("mha", "masa", {"num_atoms": 2}, ""),
    ("mla", "tpla", {"latent_shards": 2}, ""),
    ("mla", "tpla", {"latent_shards": 2, "basis": "hadamard"}, ""),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "train-all")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--csv", type=Path, default=CSV)
    options = parser.parse_args()
    calibration, held_out = text_of(options.runs / "mha", options.samples)
    rows = []
    for run, method, settings, exact in CASES:
        model, _ = attnzoo.load(options.runs / run)
        _, report = convert(model, method, calibration, held_out, **settings)
        rows.append(
            {
                "source": run,
                "method": method,
                "settings": " ".join(f"{k}={v}" for k, v in settings.items()),
                "exact": exact,
                "cache_bytes": f"{report.cache_bytes[0]:g}",
                "cache_bytes_after": f"{report.cache_bytes[1]:g}",
                "params": report.params[0],
                "params_after": report.params[1],
                "loss": f"{report.loss[0]:.4f}",
                "loss_after": f"{report.loss[1]:.4f}",
                "weight_error": f"{report.weight_error:.2g}",
                "logit_change": f"{report.logit_change:.2g}",
                "held_out_tokens": held_out[:, 1:].numel(),
                "machine": platform.machine(),
                "torch": torch.__version__,
                "date": datetime.date.today().isoformat(),
            }
        )
        print("  ".join(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {options.csv}")


if __name__ == "__main__":
    main()
