"""State tracking: a state that each token changes, and that no part of the sequence shows."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .task import Task, choice, count, flag, nothing_asked


@dataclass(frozen=True)
class Parity(Task):
    """Parity: is the number of ones so far odd?

    A recurrence whose state transitions have no negative eigenvalue cannot keep it at any length,
    arXiv 2411.12537. Bits are tokens 0 and 1, labels 2 (even) and 3 (odd).

    Args:
        k: count the last k bits only; null: all of them.
        every: ask at every token, not at the last one only.

    Example: sample 0 of seed 0 of Parity() at 12 tokens

        tokens  1 0 1 1 0 0 0 0 0 0 0 1
        labels  3 3 2 3 3 3 3 3 3 3 3 2
    """

    name = "parity"
    k: int | None = count(None, null=True)
    every: bool = flag(True)

    @property
    def num_symbols(self) -> int:
        return 4

    @property
    def least_length(self) -> int:
        return 1

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        bits, labels = rng.integers(2, size=length), nothing_asked(length)
        ones = bits.cumsum()
        if self.k is not None and self.k < length:
            ones[self.k :] -= ones[: -self.k]
        asked = slice(0 if self.every else length - 1, None)
        labels[asked] = 2 + ones[asked] % 2
        return bits, labels


@dataclass(frozen=True)
class StateTracking(Task):
    """Words of permutations: each token moves n things about; in which order are they now?

    The n things start in order, and a token with the permutation g puts at place i what was at place g(i).
    Tokens come first, then one label per order, in the order of the dictionary.

    Args:
        moves: which permutations are tokens: "swaps", those of neighbours, "pair", the first swap and the
            shift of all by one place, or "all".
        every: ask at every token, not at the last one only.
    """

    size: ClassVar[int]
    moves: str = choice("swaps", "pair", "all")
    every: bool = flag(True)

    @property
    def num_symbols(self) -> int:
        moves, orders, _ = _table(self.size, self.moves)
        return len(moves) + len(orders)

    @property
    def least_length(self) -> int:
        return 1

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        moves, _, after = _table(self.size, self.moves)
        tokens, labels = rng.integers(len(moves), size=length), nothing_asked(length)
        orders, order = [], 0
        for token in tokens.tolist():
            order = after[order][token]
            orders.append(order)
        asked = slice(0 if self.every else length - 1, None)
        labels[asked] = orders[asked]
        labels[asked] += len(moves)
        return tokens, labels


@dataclass(frozen=True)
class S3(StateTracking):
    """State tracking of three things: words of the group S3, which is solvable.

    See `StateTracking` for the dials.

    Example: sample 0 of seed 0 of S3() at 12 tokens

        tokens  0 0 0 1 1 1 1 0 0 0 0 1
        labels  4 2 4 5 4 5 4 2 4 2 4 5
    """

    name = "s3"
    size = 3


@dataclass(frozen=True)
class S5(StateTracking):
    """State tracking of five things: words of S5, the smallest group that makes it hard (NC1-complete).

    The illusion of state, arXiv 2404.08819. See `StateTracking` for the dials.

    Example: sample 0 of seed 0 of S5() at 12 tokens

        tokens   3  0  2  2  1  0  0  1  3  3  0  3
        labels   5 29 32 29 35 59 35 29 28 29  5  4
    """

    name = "s5"
    size = 5


@functools.cache
def _table(size: int, moves: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[list[int]]]:
    """The moves, all orders, and the number of the order after each order (row) and move (column)."""
    orders = list(itertools.permutations(range(size)))
    start = orders[0]
    swaps = [(*start[:i], i + 1, i, *start[i + 2 :]) for i in range(size - 1)]
    known = {"swaps": swaps, "pair": [swaps[0], (*start[1:], 0)], "all": orders}[moves]
    number = {order: i for i, order in enumerate(orders)}
    after = [[number[tuple(order[i] for i in move)] for move in known] for order in orders]
    return known, orders, after
