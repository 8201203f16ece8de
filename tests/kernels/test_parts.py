"""Kernels on parts of sequences: keys, tails and states that came from the left, with their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo import Context
from attnzoo.parallel.context import Span
from attnzoo.parallel.successive import Successive
from attnzoo_kernels.launch import interpreting

IDS = torch.tensor([[1] * 5 + [2] * 11, [3] * 8 + [4] * 6 + [0] * 2])
CASES: dict[str, dict[str, Any]] = {"mha": {}, "gqa": {"num_kv_heads": 1, "window": 4}, "gated_deltanet": {}}


@pytest.mark.slow
@pytest.mark.skipif(not (interpreting() or torch.cuda.is_available()), reason="kernels cannot run here")
@pytest.mark.parametrize("name", CASES)
def test_kernels_train_parts_as_the_reference_trains_the_whole(name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.randint(11, IDS.shape)
    found: list[list[Tensor]] = []
    for impl, ranks in (("reference", 1), ("triton", 2)):
        torch.manual_seed(1)
        model = attnzoo.create_model(name, 11, 16, 1, 2, impl=impl, **CASES[name]).to(device)
        channel = Successive()
        spans = [Span(rank, ranks, channel.channel()) if ranks > 1 else None for rank in range(ranks)]
        ids = IDS.to(device)
        outs = [model(tokens.to(device), Context(segment_ids=ids, span=span)) for span in spans]
        y = torch.cat(outs, dim=1)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in model.parameters())])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
