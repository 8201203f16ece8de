"""Query rows in runs, so that scores never exist for all of them at once: what the references share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS = 128  # query rows whose scores exist at once, over few keys
LEAST_RECOMPUTED = 2048  # tokens from which a run's scores are made again in the backward, not kept


def chunk_rows(S: int) -> int:
    """Query rows whose scores exist at once: fewer over many keys, so that their memory is bounded."""
    return ROWS if S < LEAST_RECOMPUTED else max(16, ROWS * LEAST_RECOMPUTED // S)


def by_rows(run: Callable[[slice], Sequence[Tensor]], T: int, S: int) -> list[Tensor]:
    """What ``run`` returns for runs of T query rows over S keys, joined along axis 2."""
    step, parts = chunk_rows(S), []
    recompute = torch.is_grad_enabled() and T >= LEAST_RECOMPUTED
    # the longest rows first: what they free then fits the rest, and the allocator's heap does not creep up
    for start in reversed(range(0, T, step)):
        rows = slice(start, min(start + step, T))
        parts.append(checkpoint(run, rows, use_reentrant=False) if recompute else run(rows))
    return [torch.cat(part[::-1], dim=2) for part in zip(*parts, strict=True)]
