"""Copying: say again what was read, all of it, some of it, or any of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .task import Task, count, nothing_asked, scatter


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """Selective copying: items scattered among blanks, to be said in order at the end.

    Mamba, arXiv 2312.00752. The last ``items`` tokens ask for the first item, the second and so on; the
    answers are not shown. 0 is the blank, 1 asks, items follow.

    Args:
        items: to copy. symbols: how many kinds of them there are.

    Example: sample 0 of seed 0 of SelectiveCopying(items=3, symbols=4) at 12 tokens

        tokens  2 0 0 0 4 0 0 0 4 1 1 1
        labels  . . . . . . . . . 2 4 4
    """

    name = "selective_copying"
    items: int = count(8)
    symbols: int = count(16)

    @property
    def num_symbols(self) -> int:
        return 2 + self.symbols

    @property
    def least_length(self) -> int:
        return 2 * self.items

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, labels = np.zeros(length, dtype=np.int64), nothing_asked(length)
        items = 2 + rng.integers(self.symbols, size=self.items)
        tokens[scatter(rng, self.items, 1, length - self.items)] = items
        tokens[-self.items :], labels[-self.items :] = 1, items
        return tokens, labels


@dataclass(frozen=True)
class Compression(Task):
    """Compression: a text to be kept whole, of which any place may be asked for.

    After the compression of MAD, arXiv 2403.17844, whose decoder sees one token only. Here the model itself
    answers: after the text, blanks and a mark, every place of the text is asked for once, in random order,
    by a symbol that stands for the place. A state must hold the whole text; attention only has to look.
    Symbols of the text come first, then places, the blank and the mark.

    Args:
        items: length of the text. symbols: how many kinds of them there are.

    Example: sample 0 of seed 0 of Compression(items=4, symbols=4) at 12 tokens

        tokens  1 3 3 1 8 8 8 9 6 4 5 7
        labels  . . . . . . . . 3 1 3 1
    """

    name = "compression"
    items: int = count(12)
    symbols: int = count(16)

    @property
    def num_symbols(self) -> int:
        return self.symbols + self.items + 2

    @property
    def least_length(self) -> int:
        return 2 * self.items + 1

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, labels = np.full(length, self.num_symbols - 2, dtype=np.int64), nothing_asked(length)
        text = rng.integers(self.symbols, size=self.items)
        places = rng.permutation(self.items)
        tokens[: self.items], tokens[-self.items - 1] = text, self.num_symbols - 1
        tokens[-self.items :], labels[-self.items :] = self.symbols + places, text[places]
        return tokens, labels


@dataclass(frozen=True)
class LengthExtrapolation(Task):
    """Length extrapolation: copy a string, trained on short ones and validated on longer ones.

    The copying of arXiv 2402.01032. A string, the mark, and the string once more, each symbol of which is
    asked for at the token before it; the rest is blank. A string has from half to all of the symbols that
    there is room for, so with ``val_seq_len`` at twice ``seq_len`` no validated string is as short as one
    that was trained. Symbols come first, then the mark and the blank.

    Args:
        symbols: how many there are.

    Example: sample 0 of seed 0 of LengthExtrapolation(symbols=6) at 12 tokens

        tokens  4 0 0 6 4 0 0 7 7 7 7 7
        labels  . . . 4 0 0 . . . . . .
    """

    name = "length_extrapolation"
    symbols: int = count(32, least=2)

    @property
    def num_symbols(self) -> int:
        return self.symbols + 2

    @property
    def least_length(self) -> int:
        return 3

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, labels = np.full(length, self.symbols + 1, dtype=np.int64), nothing_asked(length)
        most = (length - 1) // 2
        size = int(rng.integers(most // 2 + 1, most + 1))
        text = rng.integers(self.symbols, size=size)
        tokens[:size], tokens[size], tokens[size + 1 : 2 * size + 1] = text, self.symbols, text
        labels[size : 2 * size] = text
        return tokens, labels
