"""Writes docs/zoo.md: every variant with what it changes, what it costs, and what it learned.

python scripts/zoo_table.py            # from the cards, the cost model and benchmarks/results/train-all.csv
python scripts/zoo_table.py --check    # exit 1 where docs/zoo.md is not what would be written
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import torch

import attnzoo
from attnzoo.model import LanguageModel

ROOT = Path(__file__).parents[1]
PAGE, TRAINED = ROOT / "docs" / "zoo.md", ROOT / "benchmarks" / "results" / "train-all.csv"
SHAPE = {"vocab_size": 256, "dim": 512, "depth": 4, "num_heads": 8, "max_seq_len": 2048}
LENGTH = 2048
HEAD = f"""# The zoo

Every variant, from its card (`attnzoo show NAME`). Written by `scripts/zoo_table.py`.

- **cache** and **state**: bytes per token, and bytes whatever the length, that decoding stores in a layer
  in bf16 (states in fp32); mean over the {SHAPE["depth"]} layers of a model of dim {SHAPE["dim"]} with \
{SHAPE["num_heads"]} heads.
- **memory** and **FLOPs**: what decoding stores after {LENGTH} tokens, and forward and backward FLOPs per
  token of the mixers at T = {LENGTH}, relative to `mha`; from the cost model, which the tests reconcile with
  counted runs.
- **causal**: by nature, or *adapted*: the paper's mechanism looks ahead, and a causal form stands here, which
  `attnzoo show` tells.
- **runs on**: the implementation that `impl=auto` chooses on a CPU and on a GPU.
- **bpb**: bits per byte on unseen text after 300 steps at `model=debug`, T = 128, one run each
  (`benchmarks/results/train-all.csv`). It shows that a variant learns; differences of a few hundredths are
  noise.
"""
COLUMNS = ("name", "what changes", "paper", "cache", "state", "memory", "FLOPs", "causal", "runs on", "bpb")


def layers_of(name: str) -> LanguageModel:
    """A model of the reference shape, without memory for its weights."""
    with torch.device("meta"):
        return attnzoo.create_model(name, **SHAPE)


def costs(name: str) -> dict[str, float]:
    """Per layer, on average over the model's layers."""
    found = [mixer.cost(LENGTH) for mixer in layers_of(name).mixers]
    mean = lambda field: sum(getattr(c, field) for c in found) / len(found)  # noqa: E731
    cache, state = mean("cache_bytes_per_token"), mean("state_bytes")
    flops = mean("train_flops") + 3 * mean("weight_flops") / LENGTH
    return {"cache": cache, "state": state, "memory": cache * LENGTH + state, "flops": flops}


def implementations(name: str) -> str:
    mixer = layers_of(name).mixers[-1]
    cpu, cuda = mixer.choices["cpu"].impl, mixer.choices["cuda"].impl
    return cpu if cpu == cuda else f"{cpu} / {cuda}"


def row(name: str, base: dict[str, float], trained: dict[str, str]) -> list[str]:
    card, own = attnzoo.card(name), costs(name)
    paper = f"[{card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else card.paper
    causal = "no" if not card.traits["causal"] else "adapted" if card.adapted else "by nature"
    return [
        f"`{name}`",
        card.summary,
        paper,
        f"{own['cache']:,.0f}",
        f"{own['state']:,.0f}",
        f"{own['memory'] / base['memory']:.2f}",
        f"{own['flops'] / base['flops']:.2f}",
        causal,
        implementations(name),
        f"{float(trained[name]):.2f}" if trained.get(name) else "",
    ]


def page() -> str:
    trained: dict[str, Any] = {}
    if TRAINED.exists():
        with TRAINED.open(newline="") as file:
            trained = {r["variant"]: r["val_bpb"] for r in csv.DictReader(file)}
    base, parts = costs("mha"), [HEAD]
    names = attnzoo.list_variants()
    for family in sorted({attnzoo.card(name).family for name in names}):
        module = sys.modules.get(f"attnzoo.attention.{family}")
        parts.append(f"\n## {family}\n\n{(module.__doc__ or '').strip() if module else ''}\n")
        parts.append("| " + " | ".join(COLUMNS) + " |\n|---|---|---|---:|---:|---:|---:|---|---|---:|")
        parts += [
            "| " + " | ".join(row(n, base, trained)) + " |" for n in attnzoo.list_variants(family=family)
        ]
    return "\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = page()
    if options.check:
        return 0 if PAGE.exists() and PAGE.read_text() == text else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
