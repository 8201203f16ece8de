"""Compiled blocks give what eager ones give, and settle: nothing is compiled again after the third step."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import attnzoo

pytestmark = pytest.mark.slow


def run(name: str, backend: str, steps: int = 5) -> None:
    torch.manual_seed(0)
    options = dict(attnzoo.card(name).small)
    model = attnzoo.create_model(name, vocab_size=50, dim=32, depth=2, num_heads=4, **options)
    x = torch.randint(0, 50, (2, 33))
    y = model(x)
    want = torch.autograd.grad(y.square().mean(), list(model.parameters()), allow_unused=True)
    torch._dynamo.reset()
    counters.clear()
    for block in model.blocks:
        block.compile(backend=backend)
    graphs = []
    for _ in range(steps):
        got = model(x)
        grads = torch.autograd.grad(got.square().mean(), list(model.parameters()), allow_unused=True)
        graphs.append(counters["stats"]["unique_graphs"])
    torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-6)
    for a, b in zip(grads, want, strict=True):
        # what only an auxiliary loss trains has no part in the output
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert graphs[0] > 0, "nothing was compiled"
    assert graphs[2] == graphs[-1], f"compiled again after the third step: {graphs}"


@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_traced_blocks_equal_eager_ones(name: str) -> None:
    run(name, "eager")


@pytest.mark.parametrize("name", ["mla", "linear", "gated_deltanet"])
def test_generated_code_equals_eager(name: str) -> None:
    run(name, "inductor")
