"""Lookup: what stood after this mark, somewhere behind?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .task import Task, check_at_most, count, nothing_asked, scatter, share


@dataclass(frozen=True)
class Induction(Task):
    """Induction: what followed the last time that this symbol stood here?

    The pattern of an induction head, arXiv 2209.11895, [A][B] ... [A] -> [B], asked at every symbol that has
    occurred before, of a sequence of random symbols. What follows a symbol changes each time, so a memory
    must overwrite.

    Args:
        symbols: how many there are, and so how far back a symbol last stood.

    Example: sample 0 of seed 0 of Induction(symbols=4) at 12 tokens

        tokens  2 2 0 1 2 1 1 1 1 3 0 3
        labels  . 2 . . 0 2 1 1 1 . 1 0
    """

    name = "induction"
    symbols: int = count(16, least=2)

    @property
    def num_symbols(self) -> int:
        return self.symbols

    @property
    def least_length(self) -> int:
        return self.symbols + 1  # with so many, some symbol occurs twice

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, labels = rng.integers(self.symbols, size=length), nothing_asked(length)
        symbols, after = tokens.tolist(), {}
        for i, symbol in enumerate(symbols):
            if i:
                after[symbols[i - 1]] = symbol
            if symbol in after:
                labels[i] = after[symbol]
        return tokens, labels


@dataclass(frozen=True)
class Needle(Task):
    """Needle in a haystack: marked pairs hidden among random symbols, asked for at the end.

    A needle is the mark, a key and a value; a question is the question mark and the key, at which the value
    is asked for. Values are symbols of the haystack, so only the mark tells a needle. Symbols come first,
    then the keys, the mark and the question mark.

    Args:
        needles: hidden and asked for. keys, symbols: how many of each there are.
        depth: where the needles stand, all together, as a share of the haystack; null: anywhere.

    Example: sample 0 of seed 0 of Needle(needles=1, keys=2, symbols=6) at 12 tokens

        tokens  4 1 0 8 6 1 2 3 1 1 9 6
        labels  . . . . . . . . . . . 1
    """

    name = "needle"
    needles: int = count(1)
    depth: float | None = share(None, null=True)
    keys: int = count(8)
    symbols: int = count(32)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_most(self, "needles", "keys")

    @property
    def num_symbols(self) -> int:
        return self.symbols + self.keys + 2

    @property
    def least_length(self) -> int:
        return 5 * self.needles

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        number, hay = self.needles, length - 2 * self.needles
        tokens, labels = rng.integers(self.symbols, size=length), nothing_asked(length)
        keys = self.symbols + rng.permutation(self.keys)[:number]
        if self.depth is None:
            starts = scatter(rng, number, 3, hay)
        else:
            starts = round(self.depth * (hay - 3 * number)) + 3 * np.arange(number)
        tokens[starts], tokens[starts + 1] = self.num_symbols - 2, keys
        values, order = tokens[starts + 2], rng.permutation(number)
        tokens[hay::2], tokens[hay + 1 :: 2] = self.num_symbols - 1, keys[order]
        labels[hay + 1 :: 2] = values[order]
        return tokens, labels
