"""The time of a step: exchanges against simulated rings, a case by hand, what holds for any machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnzoo.plan.collectives import Group, gather, group, reduce, sent
from attnzoo.plan.estimate import choose, estimate
from attnzoo.plan.hardware import Hardware
from attnzoo.plan.memory import local_numel, memory
from attnzoo.plan.setup import Job, Setup
from attnzoo.plan.times import imbalance, times

SIZES = {"vocab_size": 96, "dim": 64, "depth": 4, "num_heads": 4}
PLAIN = Hardware(
    name="plain",
    source="made up",
    peak_flops=1e12,
    fp32_flops=1e11,
    memory=1e9,
    memory_bandwidth=1e10,
    per_node=4,
    link=1e9,
    network=1e8,
    link_latency=1e-5,
    network_latency=1e-4,
    launch=0.0,
    efficiency=1.0,
    bandwidth_efficiency=1.0,
    reserve=0.0,
)
SPEEDS = ("peak_flops", "fp32_flops", "memory_bandwidth", "link", "network")


def job(layout: str = "mha", length: int = 64, **options) -> Job:
    return Job({"layout": layout, **SIZES, **options}, length)


def ring(ranks: int, held: list[set]) -> list[int]:
    """Every rank passes on what came last, until all have all: chunks sent by each rank."""
    counts, last = [0] * ranks, [set(h) for h in held]
    for _ in range(ranks - 1):
        moving = last
        last = [moving[(r - 1) % ranks] for r in range(ranks)]
        for r in range(ranks):
            counts[r] += len(moving[r])
            held[r] |= last[r]
    return counts


@pytest.mark.parametrize(("inside", "nodes"), [(1, 1), (4, 1), (1, 3), (2, 4), (8, 2)])
def test_bytes_are_those_of_rings(inside: int, nodes: int) -> None:
    """Rings of equal places across nodes, then a ring in each node."""
    held = {(n, g): {(n, g)} for n in range(nodes) for g in range(inside)}
    outside_sent, inside_sent = set(), set()
    for g in range(inside):
        places = [held[n, g] for n in range(nodes)]
        outside_sent |= set(ring(nodes, places))
    for n in range(nodes):
        inside_sent |= set(ring(inside, [held[n, g] for g in range(inside)]))
    assert all(len(h) == inside * nodes for h in held.values())
    total, chunk = 7.0 * inside * nodes, 7.0
    assert len(inside_sent) == len(outside_sent) == 1
    simulated = inside_sent.pop() * chunk, outside_sent.pop() * chunk
    assert sent(total, Group(inside, nodes)) == pytest.approx(simulated)


def test_groups_lie_in_nodes_as_ranks_are_numbered() -> None:
    for world, node in ((64, 8), (24, 8), (12, 6), (6, 6), (20, 5), (720, 8), (14, 7)):
        for stride in (n for n in range(1, world + 1) if world % n == 0):
            for ranks in (n for n in range(1, world + 1) if world % (n * stride) == 0):
                found = group(ranks, stride, world, 8)
                starts = [a + b for a in range(0, world, ranks * stride) for b in range(stride)]
                nodes = [[(a + i * stride) // node for i in range(ranks)] for a in starts]
                runs = [n[i : i + found.inside] for n in nodes for i in range(0, ranks, found.inside)]
                assert found.ranks == ranks and all(len(set(run)) == 1 for run in runs)
    assert group(16, 1, 64, 8) == Group(8, 2) and group(8, 8, 64, 8) == Group(1, 8)
    assert group(3, 1, 6, 8) == Group(3, 1) and group(3, 1, 24, 8) == Group(1, 3)


def test_latency_and_bandwidth_add() -> None:
    who = Group(4, 2)
    assert gather(0, who, PLAIN) == pytest.approx(3e-5 + 1e-4)
    assert gather(8e6, who, PLAIN) - gather(0, who, PLAIN) == pytest.approx(6e6 / 1e9 + 1e6 / 1e8)
    assert reduce(8e6, who, PLAIN) == 2 * gather(8e6, who, PLAIN)
    assert gather(8e6, Group(1, 1), PLAIN) == 0


def test_a_step_by_hand() -> None:
    """One layer of mha, two DDP ranks in a node."""
    one = job(depth=1)
    found = times(one, Setup(2, "ddp", rows=3), PLAIN, overlap=0.0)
    D, T, H, V = 64, 64, 192, 96
    linear = 2 * (4 * D * D + 3 * D * H) + 2 * D * V
    attention = 2 * 2 * D * (T + 1) / 2
    assert found.products == pytest.approx(3 * 3 * T * (linear + attention) / 1e12)
    parameters = 4 * D * D + 3 * D * H + 2 * V * D + 3 * D
    assert one.cost.params == parameters
    assert found.data == pytest.approx(2 * (4 * parameters / 2 / 1e9 + 1e-5))
    assert found.optimiser == pytest.approx(40 * parameters / 1e10)
    assert found.tensor == found.context == found.wave == found.host == found.hidden == 0


def test_fsdp_gathers_blocks_twice_in_every_micro_batch() -> None:
    one = job()
    steps = [times(one, Setup(4, "fsdp", accumulate=n), PLAIN, 0.0) for n in (1, 3)]
    assert steps[1].data == pytest.approx(3 * steps[0].data)
    block = one.cost.params - 2 * 96 * 64 - 64
    moved = 4 * (3 * block + 2 * (2 * 96 * 64 + 64)) * 3 / 4
    assert steps[0].data == pytest.approx(moved / 1e9 + (3 * 4 + 2) * 3e-5)


def test_recomputing_costs_a_forward_of_the_blocks() -> None:
    plain, again = (times(job(), Setup(recompute=r), PLAIN, 0.0).products for r in (False, True))
    head = 3 * 2 * 64 * 96 * 64 / 1e12
    assert (again - head) / (plain - head) == pytest.approx(4 / 3)


def test_the_last_rank_of_a_sequence_computes_most() -> None:
    for ranks in (2, 4, 8):
        assert imbalance(job(length=1024), ranks) == pytest.approx(2 - 1 / ranks, rel=0.01)
        assert imbalance(job("gated_deltanet", 1024), ranks) == pytest.approx(1.0, abs=1e-6)
        assert imbalance(job("sliding_window", 1024, window=16), ranks) == pytest.approx(1.0, abs=0.1)


def test_states_make_a_wave_and_keys_end_it() -> None:
    setup = Setup(4, "fsdp", context=4)
    share = {}
    for layout in ("gated_deltanet", "gated_deltanet,gated_deltanet,gated_deltanet,mha", "mha"):
        found = times(job(layout), setup, PLAIN, 0.0)
        share[layout[-3:]] = found.wave / (found.products + found.elementwise)
    assert share["net"] == pytest.approx(
        3 / 4
    )  # (ranks - 1) / depth of the work, (ranks - 1) / (depth + ranks - 1) of all
    assert share["mha"] == 0
    mixed = times(job("gated_deltanet,mha"), setup, PLAIN, 0.0)
    assert mixed.wave / (mixed.products + mixed.elementwise) == pytest.approx(2 * 3 / 4)


def test_twice_as_fast_a_machine_takes_half_as_long() -> None:
    fast = replace(
        PLAIN,
        launch=1e-6,
        **{name: 2 * getattr(PLAIN, name) for name in SPEEDS},
        link_latency=PLAIN.link_latency / 2,
        network_latency=PLAIN.network_latency / 2,
    )
    slow = replace(PLAIN, launch=2e-6)
    for setup in (Setup(8, "fsdp", tensor=2, context=2, rows=2), Setup(8, "ddp"), Setup()):
        a, b = (times(job(), setup, hardware, 0.5) for hardware in (slow, fast))
        assert a.step == pytest.approx(2 * b.step)
        assert a.bounds == pytest.approx([2 * bound for bound in b.bounds])


@pytest.mark.parametrize("name", SPEEDS)
def test_nothing_gets_slower_by_faster_parts(name: str) -> None:
    setup = Setup(8, "fsdp", tensor=2, context=2)
    faster = replace(PLAIN, **{name: 3 * getattr(PLAIN, name)})
    assert times(job(), setup, faster, 0.5).step <= times(job(), setup, PLAIN, 0.5).step


def test_overlap_lies_between_its_bounds() -> None:
    fast = replace(PLAIN, link=1e10, link_latency=1e-6)
    steps = [times(job(), Setup(4, "fsdp"), fast, share) for share in (0.0, 0.5, 1.0)]
    low, high = steps[1].bounds
    assert steps[2].step == pytest.approx(low) and steps[0].step == pytest.approx(high)
    assert low < steps[1].step < high


def test_the_best_layout_fits_and_is_the_fastest() -> None:
    one, hardware = job(length=2048), replace(PLAIN, memory=3e7)
    found = choose(one, 8, 16, hardware, 0.5)
    assert found.best.fits and found.best.setup.batch == 16 and found.best.setup.gpus == 8
    for other in (Setup(8, "fsdp", rows=2), Setup(8, "fsdp", rows=1, accumulate=2, recompute=True)):
        rival = estimate(one, other, hardware, 0.5)
        assert not rival.fits or rival.tokens_per_second <= found.best.tokens_per_second
    assert any(reason.startswith("memory") for reason in found.left_out)
    assert choose(one, 8, 16, replace(PLAIN, memory=1e5), 0.5).best is None
    assert choose(one, 8, 16, hardware, 0.5, {"tensor": 2}).best.setup.tensor == 2


@pytest.mark.parametrize(("gpus", "batch", "expected"), [(24, 8, {3, 6, 12}), (6, 2, {3}), (12, 4, {3, 6})])
def test_all_ways_to_share_heads_and_sequences_are_tried(gpus: int, batch: int, expected: set[int]) -> None:
    """By force: every pair of sizes, as far as it deals out 12 heads, 6144 tokens and the samples evenly."""
    one, hardware = job(length=6144, dim=96, num_heads=12, mlp_hidden=96), replace(PLAIN, per_node=6)
    every = [
        estimate(one, Setup(gpus, "fsdp", t, c, rows, batch // (d * rows), again), hardware, 0.5)
        for t in (1, 2, 3, 4, 6)
        for c in (1, 2, 3, 4, 6)
        for d in range(1, batch + 1)
        if t * c * d == gpus and batch % d == 0
        for rows in range(1, batch // d + 1)
        if batch % (d * rows) == 0
        for again in (False, True)
    ]
    found = choose(one, gpus, batch, hardware, 0.5)
    assert {e.setup.tensor * e.setup.context for e in every} >= expected
    assert found.best.tokens_per_second == max(e.tokens_per_second for e in every if e.fits)
    nothing = choose(one, gpus, batch, replace(hardware, memory=1e3), 0.5).left_out
    assert sum(n for reason, n in nothing.items() if reason.startswith("memory")) == len(every)
    assert found.best.setup.tensor * found.best.setup.context % 3 == 0


def test_tokens_are_counted_once_whatever_the_layout() -> None:
    one = job(length=2048)
    for setup in (
        Setup(8, "fsdp", context=2, rows=2),
        Setup(8, "fsdp", tensor=2, rows=2),
        Setup(4, "ddp", rows=2),
    ):
        found = estimate(one, setup, PLAIN, 0.0)
        assert found.tokens_per_second * found.times.step == pytest.approx(setup.batch * 2048)
        assert found.mfu <= 1
    assert memory(one, Setup(8, "fsdp")).parameters >= 4 * local_numel(
        next(iter(one.traced(Setup()).shapes.values())), 8
    )
