"""Torch's flash attention of a GPU, written out for a CPU: `attnzoo.ops.last_queries` can then run there.

It knows what its arguments mean and what the kernel refuses, not how that rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from attnzoo.ops.last_queries import takes
from attnzoo.plan import trace

BACK = "_backward"
FLASH = "_scaled_dot_product_flash_attention"


class AsGpu(trace.AsGpu):
    """Tensors say that they are on a GPU, whose flash attention ``takes`` them or not."""

    def __init__(self, takes: bool = True) -> None:
        super().__init__()
        self.takes, self.asked = takes, 0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is takes:
            self.asked += 1
            return self.takes
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def flash_on_cpu() -> Iterator[Counter[str]]:
    """Counts its calls, and those for its gradients, by the operation's name."""
    library, calls = Library("aten", "IMPL"), Counter()

    def counted(name: str, run: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return run(*args, **kwargs)

        return call

    for name, run in {FLASH: flash, FLASH + BACK: flash_back}.items():
        library.impl(name, counted(name, run), "CPU")
    try:
        yield calls
    finally:
        library._destroy()


def weights(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Of ``(B, H, T, d)`` and ``(B, H, S, d)``, the last query reading all keys; and their lse."""
    T, S = q.shape[2], k.shape[2]
    s = (q @ k.mT * scale).masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), float("-inf"))
    return s.softmax(-1), s.logsumexp(-1)


def spread(z: Tensor, heads: int) -> Tensor:
    return z.repeat_interleave(heads // z.shape[1], dim=1)


def gradients(do: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    groups, (B, H, _, d) = k.shape[1], q.shape
    k, v = spread(k, H), spread(v, H)
    p, _ = weights(q, k, scale)
    dp = do @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dk, dv = (z.view(B, groups, H // groups, -1, d).sum(2) for z in (ds.mT @ q, p.mT @ do))
    return ds @ k, dk, dv


def flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, debug: bool = False, *, scale: float
) -> tuple:
    assert causal and not dropout and not debug and q.dtype == k.dtype == v.dtype
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0 and k.shape[1] == v.shape[1]
    p, lse = weights(q, spread(k, q.shape[1]), scale)
    empty = [q.new_zeros(0) for _ in range(4)]
    sizes = q.shape[2], k.shape[2]
    rng = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    o = torch.empty_like(q).copy_(p @ spread(v, q.shape[1]))
    return o, lse.float(), empty[0], empty[1], *sizes, *rng, empty[2]


def flash_back(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float) -> tuple:
    assert rest[7] is True  # causal
    return gradients(do, q, k, v, scale)
