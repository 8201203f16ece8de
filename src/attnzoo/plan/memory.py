"""Memory of a rank at its highest point, by part; bytes.

Weights, gradients and optimiser states are fp32 and spread over ``shards`` ranks by rows, the last of which
may have none; counted on the first, which has most. Gradients are all there when activations are at their
highest, as from the second micro-batch on. The highest point of activations is the loss, or the backward pass
of the last block, when all others' are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from attnzoo.plan.setup import Job, Setup
from attnzoo.plan.trace import Profile, Traced

FP32 = 4
MOMENTS = {"adamw": 2, "muon": 1}


@dataclass(frozen=True)
class Memory:
    """Bytes by part.

    Args:
        parameters, gradients, optimiser: this rank's share.
        buffers: parameters and gradients of blocks that are whole for a while (FSDP).
        copies: weights in bf16 that autograd keeps.
        activations: kept for the backward pass, tables of the forward included.
        peak: what else lives when most does: logits and their gradient, or a block at work.
        lower: what cannot be avoided: without buffers, without what only works, and with gradients and
            activations at the same time only where steps have several micro-batches.
    """

    parameters: float
    gradients: float
    optimiser: float
    buffers: float
    copies: float
    activations: float
    peak: float
    lower: float

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in PARTS)


PARTS = tuple(f.name for f in fields(Memory) if f.name != "lower")


def memory(job: Job, setup: Setup) -> Memory:
    """The memory of a rank."""
    traced = job.traced(setup)
    sizes = {name: local_numel(shape, setup.shards) for name, shape in traced.shapes.items()}
    parameters = FP32 * sum(sizes.values())
    optimiser = optimiser_bytes(job, traced, sizes)
    if setup.recompute:
        kept = sum(p.entry for p in traced.blocks)
        copies = max(p.copies for p in traced.blocks)
        working = max(p.saved - p.entry - p.copies + _most(p) for p in traced.blocks)
    else:
        copies = sum(p.copies for p in traced.blocks)
        kept = sum(p.saved - p.copies for p in traced.blocks)
        working = max(p.backward for p in traced.blocks)
    ends = traced.ends
    copies += ends.copies
    kept += traced.tables
    saved = ends.saved - ends.copies
    held = kept + copies + saved
    return Memory(
        parameters=parameters,
        gradients=parameters,
        optimiser=optimiser,
        buffers=buffers(traced, setup),
        copies=copies,
        activations=kept,
        peak=max(saved + _most(ends), working),
        lower=parameters
        + optimiser
        + (max(parameters, held) if setup.accumulate == 1 else parameters + held),
    )


def _most(profile: Profile) -> float:
    return max(profile.forward, profile.backward)


def local_numel(shape: torch.Size, shards: int) -> int:
    """Elements of a parameter that the first of ``shards`` ranks holds: whole rows."""
    if not shape:
        return 1
    return -(-shape[0] // shards) * shape[1:].numel()


def optimiser_bytes(job: Job, traced: Traced, sizes: dict[str, int]) -> float:
    """Moments in fp32; AdamW also counts steps, one number per parameter."""
    total = 0
    for name, size in sizes.items():
        kind = "muon" if job.optimiser == "muon" and name in traced.by_muon else "adamw"
        total += FP32 * (MOMENTS[kind] * size + (kind == "adamw"))
    return total


def units(traced: Traced) -> tuple[list[int], int]:
    """Numbers in the parameters of each block that is gathered by itself, and of the rest."""
    blocks = [0] * (0 if traced.entangled else len(traced.blocks))
    rest = 0
    for name, shape in traced.shapes.items():
        if blocks and name.startswith("blocks."):
            blocks[int(name.split(".")[1])] += shape.numel()
        else:
            rest += shape.numel()
    return blocks, rest


def buffers(traced: Traced, setup: Setup) -> float:
    """FSDP: the rest's parameters and gradients, and those of two blocks, the one at work and the next.

    DDP: none, for its gradients lie in the buckets that are reduced.
    """
    blocks, rest = units(traced)
    spread = setup.strategy == "fsdp" and setup.shards > 1
    return FP32 * 2 * (rest + 2 * max(blocks, default=0)) if spread else 0.0
