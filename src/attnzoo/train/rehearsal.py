"""A forward pass without data, before a run or instead of one: layers refuse what they cannot do."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from attnzoo import Collector, Context


def kinds(model: nn.Module, length: int) -> list[Hashable]:
    """A key for each block, equal for blocks that are alike; none are where layers hand tensors on.

    Call it outside of a fake mode: costs of masks are counted on tensors with content.
    """
    if any(mixer.gives or mixer.needs for mixer in model.mixers):
        return list(range(len(model.blocks)))
    costs = [mixer.cost(length) for mixer in model.mixers]
    return [
        (
            repr(block),
            cost.params,
            cost.forward_flops,
            cost.executed_flops,
            cost.cache_bytes_per_token,
            cost.state_bytes,
        )
        for block, cost in zip(model.blocks, costs, strict=True)
    ]


def check_forward(
    model: nn.Module, rows: int, length: int, alike: Iterable[Hashable], aux_weights: Collection[str]
) -> None:
    """A forward pass without data, of each kind of block once; the model is on fake tensors, in their mode.

    Args:
        rows, length: samples and their tokens. alike: as `kinds`. aux_weights: names of auxiliary losses.

    Raises:
        ValueError: a layer refuses the shape, or none reports a loss of that name.
    """
    keys = {id(block): key for block, key in zip(model.blocks, alike, strict=True)}
    collector, seen, run = Collector(), set(), model.run_block

    def once(block: nn.Module, h: torch.Tensor, *rest: Any) -> torch.Tensor:
        if keys[id(block)] in seen:
            return h
        seen.add(keys[id(block)])
        return run(block, h, *rest)

    model.run_block = once
    try:
        model(torch.zeros(rows, length, dtype=torch.long), Context(collector=collector))
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
        return  # a layer that looks at its data speaks up in the first step
    finally:
        model.run_block = run
    for name in aux_weights:
        if name not in collector.losses:
            reported = ", ".join(sorted(collector.losses)) or "none"
            raise ValueError(f"trainer.aux_weights: no layer reports {name!r}; reported: {reported}")
