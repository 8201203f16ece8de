"""What a plan says that a rank holds, against real models, optimisers and shards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

import attnzoo
from attnzoo import Context
from attnzoo.parallel.context import Span
from attnzoo.parallel.plan import split_heads
from attnzoo.parallel.shard import shard
from attnzoo.parallel.successive import Successive
from attnzoo.parallel.tensor import Share
from attnzoo.plan.memory import local_numel, memory
from attnzoo.plan.setup import Job, Setup
from attnzoo.train.optim import build_optimizer
from attnzoo.train.settings import OptimSettings
from gpu_kernels import AsGpu, flash_on_cpu

SIZES = {"vocab_size": 96, "dim": 64, "depth": 4, "num_heads": 4}
KINDS = ("mha", "gqa", "mla", "gated_deltanet", "mamba2", "sliding_window", "moh", "kvt", "cla", "gla")
ROWS, LENGTH = 3, 96


def job(layout: str, **changes) -> Job:
    options = {"layout": layout, **SIZES}
    return Job(options, LENGTH, **{"gpu": False, "bf16": False} | changes)


def loss_of(model, rows: int = ROWS, bf16: bool = False) -> torch.Tensor:
    tokens = torch.randint(SIZES["vocab_size"], (rows, LENGTH))
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        return cross_entropy(model(tokens).flatten(0, 1), tokens.flatten(), reduction="sum")


def real(layout: str):
    torch.manual_seed(0)
    return attnzoo.create_model(**{"layout": layout, **SIZES})


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("layout", ["mha", "gated_deltanet", "mla", "cla", "gated_deltanet*3,mha"])
def test_states_are_those_of_real_objects(layout: str, optimiser: str) -> None:
    model = real(layout)
    stepper = build_optimizer(model, OptimSettings(name=optimiser))
    loss_of(model).backward()
    stepper.step()
    size = lambda tensors: sum(z.numel() * z.element_size() for z in tensors)  # noqa: E731
    found = memory(job(layout, optimiser=optimiser), Setup())
    assert found.parameters == size(model.parameters())
    assert found.gradients == size(p.grad for p in model.parameters())
    assert found.optimiser == size(z for state in stepper.state.values() for z in state.values())


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("layout", ["mha", "gated_deltanet"])
def test_shards_are_those_of_fsdp(layout: str, tensor: int) -> None:
    """The first of 8 ranks holds most of what does not divide."""
    model = real(layout)
    split_heads(model, Share(0, tensor))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        shard(model, init_device_mesh("cpu", (8,)))
        held = sum(p.to_local().numel() for p in model.parameters())
    finally:
        dist.destroy_process_group()
    found = memory(job(layout), Setup(8 * tensor, "fsdp", tensor=tensor))
    assert found.parameters == 4 * held


def kept(model, run: Callable[[], torch.Tensor]) -> int:
    """Bytes that autograd keeps of ``run``, parameters left out, each storage once."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(z: torch.Tensor) -> torch.Tensor:
        kept.setdefault(z.untyped_storage().data_ptr(), z)
        return z

    with saved_tensors_hooks(pack, lambda z: z):
        loss = run()
    total = sum(z.untyped_storage().nbytes() for at, z in kept.items() if at not in known)
    assert loss.isfinite()
    return total


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layout", KINDS)
def test_activations_are_what_autograd_keeps(layout: str, bf16: bool) -> None:
    one = job(layout, bf16=bf16)
    traced = one.traced(Setup(rows=ROWS))
    counted = sum(p.saved for p in traced.blocks) + traced.ends.saved
    model = real(layout)
    found = kept(model, lambda: loss_of(model, bf16=bf16))
    assert counted <= found * 1.01 and found <= (counted + traced.tables) * 1.01


@pytest.mark.parametrize("layout", ["mha", "gqa", "mla"])
def test_the_last_rank_of_a_sequence_keeps_its_rows_and_all_keys(layout: str) -> None:
    """On a GPU, by flash attention: nothing of T/c x T."""
    ranks, model, link = 4, real(layout), Successive()
    tokens = torch.randint(SIZES["vocab_size"], (ROWS, LENGTH))

    def run(rank: int) -> torch.Tensor:
        span = Span(rank, ranks, link.channel())
        with torch.autocast("cpu", torch.bfloat16):
            y = model(tokens, Context(span=span))
            return cross_entropy(y.flatten(0, 1), span.cut(tokens).flatten(), reduction="sum")

    with flash_on_cpu() as calls, AsGpu():
        for rank in range(ranks - 1):
            run(rank)
        found = kept(model, lambda: run(ranks - 1))
    assert sum(calls.values()) == SIZES["depth"] * (ranks - 1)
    traced = job(layout, bf16=True, gpu=True).traced(Setup(ranks, "fsdp", context=ranks, rows=ROWS))
    counted = sum(p.saved for p in traced.blocks) + traced.ends.saved
    assert counted <= found * 1.01 and found <= (counted + traced.tables) * 1.01


@pytest.mark.parametrize("layout", ["mha", "gqa", "mla"])
def test_memory_grows_evenly_with_shared_sequences(layout: str) -> None:
    sizes = []
    for length in (2048, 4096):
        one = Job({"layout": layout, **SIZES}, length, bf16=True, gpu=True)
        traced = one.traced(Setup(8, "fsdp", context=8))
        sizes.append((traced.tables, traced.blocks[1].saved, traced.blocks[1].backward))
    for few, many in zip(*sizes, strict=True):
        assert many < 2.1 * few


def peak_of(run) -> int:
    """The most that was allocated at once while ``run`` ran, by the allocator's own record."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as done:
        run()
    events = [e for e in done.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", ["mha", "mla", "gated_deltanet", "sliding_window"])
def test_the_highest_point_is_that_of_the_allocator(layout: str, recompute: bool) -> None:
    model = real(layout)
    if recompute:
        model.run_block = partial(checkpoint, use_reentrant=False)
    loss_of(model).backward()  # gradients are there from now on, as in a second micro-batch
    found = memory(job(layout), Setup(rows=ROWS, recompute=recompute))
    expected = found.activations + found.copies + found.peak
    assert peak_of(lambda: loss_of(model).backward()) == pytest.approx(expected, rel=0.05)


def test_a_head_over_a_large_vocabulary_sets_the_peak() -> None:
    sizes = SIZES | {"vocab_size": 50_000, "dim": 32, "depth": 1}
    found = memory(Job({"layout": "mha", **sizes}, 64, gpu=False, bf16=True), Setup())
    # bf16 logits, their fp32 copy and log-probabilities, then the gradients of both
    assert 10 * 64 * 50_000 < found.peak < 16 * 64 * 50_000


def test_rows_scale_and_fixed_parts_do_not() -> None:
    one = job("mha", bf16=True)
    few, many = (memory(one, Setup(rows=n)) for n in (2, 7))
    assert few.copies == many.copies > 0
    direct = one._subjects[1].trace(7, LENGTH)
    assert sum(p.saved for p in direct.blocks) == pytest.approx(
        many.activations + many.copies - direct.tables, rel=0.05
    )


def test_recomputing_keeps_only_what_enters_a_block() -> None:
    one = job("mha")
    traced = one.traced(Setup(rows=ROWS, recompute=True))
    found = memory(one, Setup(rows=ROWS, recompute=True))
    assert found.activations == SIZES["depth"] * ROWS * LENGTH * SIZES["dim"] * 4 + traced.tables


def test_more_shards_hold_less_and_more_tokens_hold_more() -> None:
    one = job("mla")
    parts = [memory(one, Setup(n, "fsdp")).parameters for n in (1, 2, 4, 16)]
    assert parts == sorted(parts, reverse=True) and parts[0] == 4 * one.cost.params
    totals = [memory(one, Setup(rows=n)).total for n in (1, 2, 4)]
    assert totals == sorted(totals)
    assert memory(one, Setup(8, "ddp")).buffers == 0
    assert local_numel(torch.Size([10, 3]), 4) == 9 and local_numel(torch.Size([]), 4) == 1


def test_heads_are_halved_by_two_ranks() -> None:
    one = job("mha")
    whole, half = (sum(p.saved for p in one.traced(Setup(n, "fsdp", tensor=n)).blocks) for n in (1, 2))
    assert 0.5 < half / whole < 0.75
    ahead = one.traced(Setup(2, "fsdp", tensor=2)).blocks[1].ahead
    assert ahead.added == 2 * LENGTH * SIZES["dim"] * 4 and ahead.added_calls == 2  # mixer and MLP


def test_ranks_that_share_sequences_gather_keys_and_pass_states() -> None:
    soft, state = (
        job(name).traced(Setup(4, "fsdp", context=4)).blocks[1] for name in ("mha", "gated_deltanet")
    )
    assert soft.ahead.gathered == soft.back.gathered == 2 * LENGTH * SIZES["dim"] * 4
    assert soft.ahead.passed == 0 and state.ahead.gathered == 0
    mixer = real("gated_deltanet").mixers[0]
    states = [s for s in mixer.memory().values() if s.kind == "state"]
    assert state.ahead.passed >= 4 * sum(s.size for s in states)


def test_a_gpu_runs_kernels_and_a_cpu_plain_torch() -> None:
    kernel, plain = (
        job("gated_deltanet", bf16=True, gpu=gpu).traced(Setup()).blocks[1] for gpu in (True, False)
    )
    assert kernel.calls < plain.calls / 2 and kernel.saved < plain.saved


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="looks at its data"):
        memory(job("lama"), Setup())
    with pytest.raises(ValueError, match="next-token"):
        memory(job("efficient_dlm"), Setup())
    with pytest.raises(ValueError, match=r"context_parallel"):
        memory(job("mtla"), Setup(2, "fsdp", context=2))


def test_a_wide_block_at_work_sets_the_peak_where_the_vocabulary_is_small() -> None:
    options = {"layout": "mha", **SIZES, "vocab_size": 16, "mlp_hidden": 1024}
    torch.manual_seed(0)
    model = attnzoo.create_model(**options)
    tokens = torch.randint(16, (ROWS, LENGTH))

    def run() -> None:
        cross_entropy(model(tokens).flatten(0, 1), tokens.flatten(), reduction="sum").backward()

    run()
    found = memory(Job(options, LENGTH, bf16=False, gpu=False), Setup(rows=ROWS))
    assert peak_of(run) == pytest.approx(found.activations + found.copies + found.peak, rel=0.05)
