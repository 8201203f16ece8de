"""Functions: one that is the same in every sample and goes into the weights, one drawn for each sample."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .task import Task, count, nothing_asked


@dataclass(frozen=True)
class Memorisation(Task):
    """Memorisation: every key has one value, in all samples, which only the weights can know.

    MAD, arXiv 2403.17844. A sample is a row of random keys, each asking for its value. The table is a
    function of the dials, the same for every seed. Keys come first, values next.

    Args:
        keys, values: how many of each there are.

    Example: sample 0 of seed 0 of Memorisation(keys=4, values=4) at 12 tokens

        tokens  1 2 3 0 1 3 2 1 0 0 3 1
        labels  4 4 4 5 4 4 4 4 5 5 4 4
    """

    name = "memorisation"
    keys: int = count(256)
    values: int = count(64)

    @property
    def num_symbols(self) -> int:
        return self.keys + self.values

    @property
    def least_length(self) -> int:
        return 1

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = rng.integers(self.keys, size=length)
        return tokens, self.keys + table(self.keys, self.values)[tokens]


@functools.lru_cache(maxsize=8)
def table(keys: int, values: int) -> np.ndarray:
    """``(keys,)``: the value of each key."""
    return np.random.Generator(np.random.Philox(key=[keys, values])).integers(values, size=keys)


@dataclass(frozen=True)
class Regression(Task):
    """In-context regression: points of a linear function drawn for this sample; predict the next y.

    After arXiv 2208.01066, in tokens: numbers from -1 to 1 are rounded to one of ``levels``. A point is the
    ``dim`` coordinates of x and then y = w . x / dim, with w uniform in [-1, 1]. y is asked for at the
    token before it, once ``dim`` points have been told. Levels of x come first, those of y next, and the last
    symbol fills the end. Rounding hides w, so no accuracy of 1 can be had.

    Args:
        dim: coordinates of x. levels: numbers that can be told apart.

    Example: sample 1 of seed 0 of Regression(dim=1, levels=9) at 12 tokens

        tokens   4 13  8 16  7 15  2 12  8 16  5 14
        labels   .  . 16  . 15  . 12  . 16  . 14  .
    """

    name = "regression"
    dim: int = count(1, most=64)
    levels: int = count(15, least=2, most=4096)

    @property
    def num_symbols(self) -> int:
        return 2 * self.levels + 1

    @property
    def least_length(self) -> int:
        return (self.dim + 1) * (self.dim + 1)

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        points, width, top = length // (self.dim + 1), self.dim + 1, self.levels - 1
        x = rng.integers(self.levels, size=(points, self.dim))
        w = rng.uniform(-1, 1, size=self.dim)
        y = (2 * x / top - 1) @ w / self.dim
        level = self.levels + np.rint((y + 1) / 2 * top).astype(np.int64)
        tokens, labels = np.full(length, 2 * self.levels, dtype=np.int64), nothing_asked(length)
        tokens[: points * width] = np.concatenate([x, level[:, None]], axis=1).ravel()
        asked = np.arange(self.dim, points) * width + self.dim - 1
        labels[asked] = level[self.dim :]
        return tokens, labels
