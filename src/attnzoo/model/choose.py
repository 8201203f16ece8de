"""How a token is chosen from logits, and what has been written so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chooser:
    """Draws tokens.

    Args:
        temperature: 0 = the likeliest token. top_k, top_p: only the likeliest tokens.
        draws: a generator per row, or None for torch's own.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    draws: Sequence[torch.Generator | None]

    def __call__(self, logits: Tensor) -> Tensor:
        """``(B, vocab)`` -> ``(B,)``."""
        if self.temperature == 0:
            return logits.argmax(-1)
        rows = zip(self.probabilities(logits), self.draws, strict=True)
        return torch.cat([torch.multinomial(row, 1, generator=draw) for row, draw in rows])

    def each(self, logits: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """``(n, vocab)`` of one row -> its tokens ``(n,)`` and their probabilities."""
        if self.temperature == 0:
            best = logits.float().softmax(-1).max(-1)
            return best.indices.cpu(), best.values.cpu()
        p = self.probabilities(logits)
        tokens = torch.multinomial(p, 1, generator=self.draws[row])
        return tokens[:, 0], (p / p.sum(-1, keepdim=True)).gather(1, tokens)[:, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """``(n, vocab)``, not normalised, on the CPU."""
        p = (logits.float() / self.temperature).softmax(-1).cpu()
        if self.top_k is not None and self.top_k < p.shape[-1]:
            p = p.masked_fill(p < p.topk(self.top_k, dim=-1).values[:, -1:], 0.0)
        if self.top_p is not None:
            ranked, order = p.sort(dim=-1, descending=True)
            outside = ranked.cumsum(-1) - ranked >= self.top_p * p.sum(-1, keepdim=True)
            p = torch.zeros_like(p).scatter(-1, order, ranked.masked_fill(outside, 0.0))
        return p


class Results:
    """The new tokens of each row, up to ``most`` or to a stop sequence; ``live``: rows that go on."""

    def __init__(self, batch: int, most: int, stop: Sequence[Sequence[int]]) -> None:
        self.most, self.stop = most, [list(s) for s in stop if s]
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.live = set(range(batch))

    def add(self, row: int, token: int) -> None:
        """Appends a token to a row that goes on."""
        written = self.rows[row]
        written.append(token)
        ended = next((s for s in self.stop if written[-len(s) :] == s), None)
        if ended is not None:
            del written[-len(ended) :]
        if ended is not None or len(written) == self.most:
            self.live.discard(row)
