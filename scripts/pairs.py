"""Tries every variant with each composition option, against the property suite.

    python scripts/pairs.py                              # the whole matrix, on all cores
    python scripts/pairs.py --variants 'm?a' --csv -     # print only

A pair passes all properties, or it is refused when it is built, and the refusal is the reason in the matrix;
anything else is a defect and fails the script. The matrix goes to benchmarks/results/pairs.csv. A normaliser
other than softmax is stood in for by softmax off by one, exp(s) / (1 + sum exp(s)), which is registered here
only.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnzoo
from attnzoo.attention.base import Stage
from attnzoo.attention.draft import Draft
from attnzoo.testing import PROPERTIES, Subject
from attnzoo.testing.subject import DIM, HEADS

CSV = Path(__file__).parents[1] / "benchmarks" / "results" / "pairs.csv"
PARTNERS: dict[str, dict[str, Any]] = {
    "num_kv_heads": {"num_kv_heads": 2},
    "window": {"window": 6},
    "output_gate": {"output_gate": "headwise"},
    "qk_norm": {"qk_norm": True},
    "normaliser": {"add": "off_by_one"},
}


class OffByOne(Stage):
    """Softmax with one more, empty, key of score 0: a row may attend to nothing."""

    def forward(self, s: Tensor, visible: Tensor) -> Tensor:
        s = s if s.dtype == torch.float64 else s.float()
        s = s.masked_fill(~visible, float("-inf"))
        top = s.amax(-1, keepdim=True).clamp(min=0.0)
        e = (s - top).exp()
        return e / (e.sum(-1, keepdim=True) + (-top).exp())


@attnzoo.register(
    attnzoo.Card("off_by_one", title="Softmax off by one", family="scripts", summary="Only for this script.")
)
def off_by_one(draft: Draft) -> None:
    """Sets the normaliser."""
    draft.put("normalise", OffByOne())


def try_pair(name: str, partner: str) -> dict[str, str]:
    """What becomes of ``name`` with ``partner``: "passes", "refused" with the reason, or "fails"."""
    torch.set_num_threads(1)
    card, start = attnzoo.card(name), time.perf_counter()
    row = {"variant": name, "partner": partner}
    # the card's small options show the mechanism; defaults where these have no room for the partner
    for options in ({**card.small, **PARTNERS[partner]}, PARTNERS[partner]):
        subject = Subject.of(name, card.layers, **options)
        try:
            subject.make(DIM, HEADS, **options)
        except ValueError as error:
            reason = str(error)
        else:
            break
    else:
        return row | {"result": "refused", "reason": reason, "seconds": ""}
    broken = []
    for title, holds in PROPERTIES.items():
        try:
            holds(subject)
        except Exception as error:
            broken.append(f"{title}: {error}")
    seconds = f"{time.perf_counter() - start:.1f}"
    result = "fails" if broken else "passes"
    return row | {"result": result, "reason": "; ".join(broken)[:300], "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default="*", help="glob, or names with commas")
    parser.add_argument("--partners", default=",".join(PARTNERS))
    parser.add_argument("--csv", default=str(CSV), help="where the matrix goes; - writes none")
    args = parser.parse_args()
    names = [n for glob in args.variants.split(",") for n in attnzoo.list_variants(glob) if n != "off_by_one"]
    pairs = [(name, partner) for name in names for partner in args.partners.split(",")]
    rows = []
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        for row in pool.map(partial(_apply, try_pair), pairs):
            rows.append(row)
            if row["result"] != "passes":
                print(f"{row['variant']} x {row['partner']}: {row['result']}: {row['reason']}", flush=True)
    counts = {r: sum(row["result"] == r for row in rows) for r in ("passes", "refused", "fails")}
    print(", ".join(f"{n} {result}" for result, n in counts.items()))
    if args.csv != "-":
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [k for k in rows[0] if k != "seconds"], lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: v for k, v in row.items() if k != "seconds"} for row in rows)
        print(f"wrote {args.csv}")
    return 1 if counts["fails"] else 0


def _apply(function, pair):
    return function(*pair)


if __name__ == "__main__":
    sys.exit(main())
