"""Follows tensors through a part of a model: what lives at once, what is kept, read and written."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnzoo.plan.probes import Exchanges

# products, whose time is that of their FLOPs and not of what they read
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "convolution", "attention", "scan")
FREE = ("detach", "empty", "view", "alias", "expand", "permute", "transpose", "lift_fresh")


NOTHING = Exchanges()


@dataclass(frozen=True)
class Profile:
    """Bytes of one part of a model, for one micro-batch.

    Args:
        entry: what enters, kept where the part is recomputed.
        saved: what autograd keeps for the backward pass but parameters and tables, ``entry`` included.
        copies: of ``saved``, parameters in another dtype: there once, however large the micro-batch.
        forward, backward: what else lives at the highest point of a pass, gradients of parameters left out.
        traffic, back_traffic: what operations but products read and write in the forward, in the backward.
        calls, back_calls: operations.
        ahead, back: what is exchanged in the forward, in the backward.
    """

    entry: float = 0
    saved: float = 0
    copies: float = 0
    forward: float = 0
    backward: float = 0
    traffic: float = 0
    back_traffic: float = 0
    calls: float = 0
    back_calls: float = 0
    ahead: Exchanges = NOTHING
    back: Exchanges = NOTHING


class Watch(TorchDispatchMode):
    """Follows storages from the operation that makes them to their end."""

    def __init__(self, parameters: set[int]) -> None:
        super().__init__()
        self.parameters = parameters
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.kept: dict[int, int] = {}
        self.copied: set[int] = set()
        self.sizes: dict[int, int] = {}  # of all that was made
        self.passes = {False: [0, 0, 0], True: [0, 0, 0]}  # peak, traffic, calls; by whether it is backward
        self.back = False
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._paused:
            return out
        given = [z for z in tree_leaves((args, kwargs)) if isinstance(z, Tensor)]
        made = [z for z in tree_leaves(out) if isinstance(z, Tensor)]
        known, name = {key_of(z) for z in given}, func._schema.name.partition("::")[2]
        fresh = [z for z in made if key_of(z) not in known]
        for z in fresh:
            key, storage = key_of(z), z.untyped_storage()
            self.live.setdefault(key, (StorageWeakRef(storage), storage.nbytes()))
            self.sizes[key] = storage.nbytes()
            if name == "_to_copy" and known & self.parameters:
                self.copied.add(key)
        changed = func._schema.is_mutable or fresh
        if changed and not name.startswith(FREE):
            self._count(name, given, made)
        return out

    def _count(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        counts = self.passes[self.back]
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        counts[0] = max(counts[0], sum(size for _, size in self.live.values()))
        counts[2] += 1
        if not any(word in name for word in PRODUCTS):
            counts[1] += sum(z.numel() * z.element_size() for z in [*given, *made])

    def profile(self, entry: int = 0, tables: Collection[int] = (), back: bool = False) -> Profile:
        """What was seen; also in the backward pass, which has ended, where ``back``."""
        kept = {key: size for key, size in self.kept.items() if key not in tables}
        inside = sum(size for key, size in self.sizes.items() if key in kept or key in tables)
        (peak, traffic, calls), (high, back_traffic, back_calls) = self.passes[False], self.passes[True]
        self.back = True
        return Profile(
            entry=entry,
            saved=sum(kept.values()),
            copies=sum(size for key, size in kept.items() if key in self.copied),
            forward=max(0, peak - inside),
            backward=max(0, high - inside) if back else sum(kept.values()),
            traffic=traffic,
            back_traffic=back_traffic if back else 2 * traffic,
            calls=calls,
            back_calls=back_calls if back else 2 * calls,
        )


def key_of(z: Tensor) -> int:
    return z.untyped_storage()._cdata
