"""Which keys each query may use, as two columns of numbers: one form for documents, caches and windows.

The key axis holds documents one after another, and every query's own token is one of the keys. A query that
stands at key column ``own`` in a document that starts at key column ``first`` sees

    j <= own  and  j >= first  and  (own - j < window  or  j - first < n_sink)

Without documents and cache, own = 0..T-1 and first = 0. A row with own < first sees nothing (padding).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The visible keys of every query.

    Args:
        first, own: ``(B or 1, T)`` int32 key columns; both must not decrease along T (not checked), except
            that a tail of padding has own < first.
        window: keys at distance below it; None = all.
        n_sink: first keys of the document that stay visible beyond the window.
    """

    first: Tensor
    own: Tensor
    window: int | None = None
    n_sink: int = 0

    @classmethod
    def causal(cls, T: int, S: int, device: torch.device, window: int | None = None, n_sink: int = 0) -> Span:
        """One document whose last query is the last key."""
        own = torch.arange(S - T, S, device=device, dtype=torch.int32)[None]
        return cls(torch.zeros_like(own), own, window, n_sink)

    def check(self, B: int, T: int, S: int, device: torch.device) -> None:
        for name, x in (("first", self.first), ("own", self.own)):
            if tuple(x.shape) not in ((B, T), (1, T)) or x.dtype != torch.int32:
                raise ValueError(f"span.{name}: needs int32 ({B} or 1, {T}), got {x.dtype} {tuple(x.shape)}")
            if x.device != device:
                raise ValueError(f"span.{name}: needs q's device {device}, got {x.device}; move it there")
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"span.window: must be at least 1 (the query's own token counts), got {self.window}"
            )
        if self.n_sink < 0:
            raise ValueError(f"span.n_sink: must be at least 0, got {self.n_sink}")

    def visible(self, S: int, rows: slice = slice(None), cols: slice = slice(None)) -> Tensor:
        """``(B or 1, 1, t, s)`` bool table of some rows and key columns."""
        j = torch.arange(S, device=self.own.device, dtype=torch.int32)[cols]
        return self.sees(self.own[:, rows, None], self.first[:, rows, None], j)[:, None]

    def sees(self, own: Tensor, first: Tensor, j: Tensor) -> Tensor:
        """Whether queries at ``own``, in documents from ``first``, see key columns ``j``; broadcasts."""
        seen = (j <= own) & (j >= first)
        if self.window is not None:
            seen &= (own - j < self.window) | (j - first < self.n_sink)
        return seen

    def cols(self, S: int, rows: slice) -> slice:
        """Key columns that some of the rows can see; one synchronisation on a GPU, none for the reference."""
        own, first = self.own[:, rows], self.first[:, rows]
        low = first
        if self.window is not None and not self.n_sink:
            low = torch.maximum(first, own - self.window + 1)
        low = low.masked_fill(own < first, S)
        start, stop = int(low.min()), int(own.max()) + 1
        return slice(min(max(start, 0), S), max(min(stop, S), 0))
