"""Compiled blocks give what eager ones give, and settle: nothing is compiled again after the third step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import attnzoo
from attnzoo.train.blocks import prepare_blocks

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Torch's own, whatever a test before has set."""
    with (
        torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256),
        torch._functorch.config.patch(backward_pass_autocast="same_as_forward"),
    ):
        yield


def build(name: str, depth: int = 2) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    options = dict(attnzoo.card(name).small)
    model = attnzoo.create_model(name, vocab_size=50, dim=32, depth=depth, num_heads=4, **options)
    return model, torch.randint(0, 50, (2, 33))


def check(model: nn.Module, x: torch.Tensor, backend: str, rtol: float, atol: float) -> None:
    """Outputs and gradients, and that the third step compiles the last graph."""
    y = model(x)
    want = torch.autograd.grad(y.square().mean(), list(model.parameters()), allow_unused=True)
    torch._dynamo.reset()
    counters.clear()
    for block in model.blocks:
        block.compile(backend=backend)
    graphs = []
    for _ in range(5):
        got = model(x)
        grads = torch.autograd.grad(got.square().mean(), list(model.parameters()), allow_unused=True)
        graphs.append(counters["stats"]["unique_graphs"])
    torch.testing.assert_close(got, y, rtol=rtol, atol=atol)
    for a, b in zip(grads, want, strict=True):
        # what only an auxiliary loss trains has no part in the output
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=10 * rtol, atol=atol)
    assert graphs[0] > 0, "nothing was compiled"
    assert graphs[2] == graphs[-1], f"compiled again after the third step: {graphs}"


@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_compiled_blocks_equal_eager_ones(name: str) -> None:
    """As torch traces them, forward and backward, in fp64: only the order of sums may differ."""
    model, x = build(name)
    check(model.double(), x, "aot_eager", rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ["mla", "linear", "gated_deltanet"])
def test_generated_code_equals_eager(name: str) -> None:
    check(*build(name), "inductor", rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mha", "retnet", "gated_deltanet", "kda", "pavlovian"])
def test_compiled_blocks_under_autocast(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In bf16 no further from fp64 than eager blocks are, but for the order of roundings."""
    model, x = build(name)

    def grads(amp: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = model(x).double().square().mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    exact = [grad.double() for grad in (model.double(), grads(False))[1]]
    model.float()
    eager = grads(True)
    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    prepare_blocks(model, recompute=False, compiled=True)
    compiled = grads(True)
    for a, b, c in zip(compiled, eager, exact, strict=True):
        off = [float((z - c).norm() / c.norm()) for z in (a, b)]
        assert off[0] <= 2 * off[1] + torch.finfo(torch.bfloat16).eps


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
    model, tokens = build(name, depth)
    model.double()

    def step() -> tuple[torch.Tensor, ...]:
        collector = attnzoo.Collector()
        y = model(tokens, attnzoo.Context(collector=collector))
        return y, *torch.autograd.grad(y.square().mean() + collector.total(), list(model.parameters()))

    want = step()
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        prepare_blocks(model, recompute, compiled=True)
        for _ in range(3):
            got = step()
            graphs = counters["stats"]["unique_graphs"]
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        step()
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == graphs == kinds
