"""Compiled blocks give what eager ones give, and settle: nothing is compiled again after the third step."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import attnzoo
from attnzoo.train.blocks import prepare_blocks

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


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("name", "depth", "kinds"),
    [("mha", 4, 2), ("moh", 4, 2), ("retnet", 4, 2), ("gated_deltanet", 4, 1), ("hgrn2", 10, 10)],
)
def test_blocks_alike_share_compiled_code(
    monkeypatch: pytest.MonkeyPatch, name: str, depth: int, kinds: int, recompute: bool
) -> None:
    """Also recomputed, in fp64: what is left between them and plain blocks is the order of sums.

    The first layer makes what the others find (tables of positions), so is of a kind of its own. More kinds
    than the graphs that torch lets one function have (hgrn2: each layer has its bounds) are compiled all the
    same.
    """
    torch.manual_seed(0)
    options = dict(attnzoo.card(name).small)
    model = attnzoo.create_model(name, vocab_size=50, dim=32, depth=depth, num_heads=4, **options).double()
    tokens = torch.randint(0, 50, (2, 33))

    def step() -> tuple[torch.Tensor, ...]:
        collector = attnzoo.Collector()
        y = model(tokens, attnzoo.Context(collector=collector))
        return y, *torch.autograd.grad(y.square().mean() + collector.total(), list(model.parameters()))

    want = step()
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    with torch._dynamo.config.patch(
        recompile_limit=8, accumulated_recompile_limit=256, fail_on_recompile_limit_hit=True
    ):
        prepare_blocks(model, recompute, compiled=True)
        for _ in range(3):
            got = step()
            graphs = counters["stats"]["unique_graphs"]
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        step()
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == graphs == kinds
