"""Seeds, and the states of the random generators as plain values.

All draws inside a step are functions of the seed, the step, the micro-batch and the rank. What callbacks and
other packages draw between steps goes on after a resume through these states. Generators of their own are
theirs to keep.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def seed_draws(key: str) -> None:
    """Seed every generator that a model may draw from, on all devices."""
    seed = derived_seed(key)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def derived_seed(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def draw_states() -> dict[str, Any]:
    """The generators of this process: torch's of the CPU and its GPU, numpy's and Python's."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": {
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "python": {"version": version, "internal": torch.tensor(internal), "gauss": next_gauss},
    }


def gather_draw_states(world: int) -> list[dict[str, Any]]:
    """`draw_states` of every rank; all ranks must call it."""
    own = draw_states()
    if world == 1:
        return [own]
    states: list[dict[str, Any]] = [{} for _ in range(world)]
    dist.all_gather_object(states, own)
    return states


def restore_draw_states(states: Mapping[str, Any]) -> None:
    """Go on drawing where `draw_states` was taken."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
    numpy, python = states["numpy"], states["python"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))
