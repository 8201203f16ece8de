"""`attnzoo list` and `attnzoo show`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import torch

from attnzoo import registry


def list_command(options: argparse.Namespace) -> int:
    """Print name, family and summary of the variants that match."""
    names = registry.list_variants(options.glob, family=options.family)
    if not names:
        every = registry.list_variants()
        families = sorted({registry.card(name).family for name in every})
        raise ValueError(
            f"list: no variant matches {options.glob!r}"
            + (f" in family {options.family!r}" if options.family else "")
            + f"; names: {', '.join(every)}; families: {', '.join(families)}"
        )
    cards = [registry.card(name) for name in names]
    print(table([card.name, card.family, card.summary] for card in cards))
    return 0


def show_command(options: argparse.Namespace) -> int:
    """Print a variant's card, its equations, and its costs beside those of mha."""
    card = registry.card(options.name)
    if options.seq_len < 1:
        raise ValueError(f"--seq-len: must be an integer of at least 1, got {options.seq_len}")
    print(f"{card.name}: {card.title} ({card.family})\n{card.summary}")
    if card.paper:
        print(f"Paper: {card.paper}" + (f", arXiv {card.arxiv}" if card.arxiv else ""))
    print(f"Cached: {card.cached}")
    if card.adapted:
        print(f"Causal form: {card.adapted}")
    for claim in card.claims:
        print(f"Claim: {claim}")
    broken = [trait for trait, holds in card.traits.items() if not holds]
    if broken:
        print(f"Does not hold: {', '.join(broken)}")
    print(f"\n{registry.equations(card.name)}\n\nOptions:")
    print(table([f"  {name}", repr(default)] for name, default in sorted(card.defaults.items())))
    shape = f"dim {options.dim}, {options.num_heads} heads, {options.seq_len} tokens"
    print(f"\nOne layer at {shape}, bf16 cache:")
    print(table(_costs(list(dict.fromkeys([card.name, "mha"])), options)))
    return 0


def _costs(names: Sequence[str], options: argparse.Namespace) -> Iterable[Sequence[str]]:
    mixers = [registry.create(name, dim=options.dim, num_heads=options.num_heads) for name in names]
    costs = [mixer.cost(options.seq_len, dtype=torch.bfloat16) for mixer in mixers]
    yield ["", *names]
    for title, field in (
        ("parameters", "params"),
        ("forward FLOPs/token", "forward_flops"),
        ("training FLOPs/token", "train_flops"),
        ("cache bytes/token", "cache_bytes_per_token"),
        ("state bytes", "state_bytes"),
    ):
        yield [f"  {title}", *(f"{getattr(cost, field):,.0f}" for cost in costs)]


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows as aligned columns."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
