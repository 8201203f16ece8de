"""Running sums, maxima and log-sum-exps, block summaries and key positions: by loops over each document."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnzoo.attention import timeline
from attnzoo.attention.call import Call
from attnzoo.attention.memory import Memory
from attnzoo.attention.site import Site
from attnzoo.attention.slots import Retain, Slot, build_cache
from attnzoo.attention.stages.running import before, count, running_logsumexp, running_max, running_sum
from attnzoo.context import Context

B, T, PER = 2, 19, 3
IDS = torch.tensor([[1] * 5 + [2] * 9 + [0] * 2 + [3] * 3, [0] + [4] * 13 + [5] * 5])
SPLITS = [(T,), (1,) * T, (4, 1, 1, 9, 4), (5, 14), (13, 6)]
LOOPS: dict[str, tuple[Callable, Callable[[Tensor], Tensor]]] = {
    "sum": (running_sum, lambda z: z.sum(0)),
    "max": (running_max, lambda z: z.max(0).values),
    "logsumexp": (running_logsumexp, lambda z: z.logsumexp(0)),
}


def documents(ids: Tensor | None) -> list[tuple[int, list[int]]]:
    """(row, places) of every document."""
    if ids is None:
        return [(b, list(range(T))) for b in range(B)]
    return [(b, [t for t in range(T) if ids[b, t] == i]) for b in range(B) for i in ids[b].unique() if i > 0]


def in_pieces(run: Callable[[Call, Tensor], Tensor], z: Tensor, ids: Tensor | None, split, slots) -> Tensor:
    """``run`` on consecutive pieces, on one cache where there are several."""
    cache, outs, start = build_cache(slots, None, B, T, z.dtype, "cpu", True), [], 0
    for size in split:
        here = slice(start, start + size)
        ctx = Context(segment_ids=None if ids is None else ids[:, here])
        line = timeline.read(ctx, B, size, z.device, cache.clock if len(split) > 1 else None)
        call = Call(Site(), z[:, here], ctx, line, cache if len(split) > 1 else None)
        outs.append(line.restore(run(call, line.compact(z[:, here]))))
        line.advance()
        start += size
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one", "packed"])
@pytest.mark.parametrize("name", LOOPS)
def test_running(name: str, ids: Tensor | None, split: tuple[int, ...]) -> None:
    running, whole = LOOPS[name]
    z = torch.randn(B, T, 2, dtype=torch.float64)
    slots = {"r": Slot("state", (2,))}
    found = in_pieces(lambda call, z: running(z, call, "r"), z, ids, split, slots)
    for b, places in documents(ids):
        for i, t in enumerate(places):
            torch.testing.assert_close(found[b, t], whole(z[b, places[: i + 1]]))


def test_sums_of_short_documents_keep_their_digits_in_long_rows() -> None:
    """As differences of sums over the row they would be off by 1e-4 at its end."""
    length = 4096
    ids = (torch.arange(length) // 8 + 1)[None]
    z = 1 + torch.rand(1, length, 3)
    line = timeline.read(Context(segment_ids=ids), 1, length, z.device)
    found = running_sum(z, Call(Site(), z, Context(), line, None), "r")
    exact = z.double().unflatten(1, (-1, 8)).cumsum(2).flatten(1, 2)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_a_document_does_not_see_that_another_overflows() -> None:
    ids = torch.tensor([[1] * 4 + [2] * 5])
    z = torch.randn(1, 9, 1)
    z[:, 2] = torch.inf
    line = timeline.read(Context(segment_ids=ids), 1, 9, z.device)
    found = running_sum(z, Call(Site(), z, Context(), line, None), "r")
    torch.testing.assert_close(found[:, 4:], z[:, 4:].cumsum(1))


@pytest.mark.parametrize("name", LOOPS)
def test_running_gradients(name: str) -> None:
    z = torch.randn(B, T, 1, dtype=torch.float64, requires_grad=True)

    def run(z: Tensor) -> Tensor:
        return in_pieces(lambda call, z: LOOPS[name][0](z, call, "r"), z, IDS, (T,), {})

    assert torch.autograd.gradcheck(run, (z,))


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one", "packed"])
def test_before_and_count(ids: Tensor | None, split: tuple[int, ...]) -> None:
    z = torch.randn(B, T, 1, dtype=torch.float64)

    def run(call: Call, z: Tensor) -> Tensor:
        start = None if call.mem.cache is None else call.mem.state("r").clone()
        return before(z, running_max(z, call, "r"), call, start) + 100 * count(call, z)[..., None]

    found = in_pieces(run, z, ids, split, {"r": Slot("state", (1,))})
    for b, places in documents(ids):
        for i, t in enumerate(places):
            expected = z[b, places[: max(i, 1)]].max() + 100 * (i + 1)
            torch.testing.assert_close(found[b, t, 0], expected)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one", "packed"])
def test_blocks(ids: Tensor | None, split: tuple[int, ...]) -> None:
    """A query sees the sums of its document's finished blocks, once each."""
    z = torch.randn(B, T, 1, dtype=torch.float64)
    slots = {"s": Slot("state", (1,)), "b": Slot("blocks", (1, 1), PER)}

    def run(call: Call, z: Tensor) -> Tensor:
        blocks = call.mem.blocks("b", running_sum(z, call, "s")[:, None], PER)[:, 0, :, 0]
        key, query = call.mem.block_axis(PER), call.query
        seen = (key.order[:, None] <= query.order[:, :, None]) & ((key.order[:, None] + 1) % PER == 0)
        if key.doc is not None:
            seen = seen & (key.doc[:, None] == query.doc[:, :, None])
        return (seen.to(z.dtype) @ blocks[..., None]).expand(B, -1, 1)

    found = in_pieces(run, z, ids, split, slots)
    for b, places in documents(ids):
        for i, t in enumerate(places):
            ends = [places[: e + 1] for e in range(i + 1) if (e + 1) % PER == 0]
            expected = sum((z[b, end].sum() for end in ends), torch.zeros(()).double())
            torch.testing.assert_close(found[b, t, 0], expected)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one", "packed"])
def test_blocks_that_end(ids: Tensor | None, split: tuple[int, ...]) -> None:
    """The same, where summaries exist of finished blocks only."""
    z = torch.randn(B, T, 1, dtype=torch.float64)
    slots = {"s": Slot("state", (1,)), "b": Slot("blocks", (1, 1), PER)}

    def run(call: Call, z: Tensor) -> Tensor:
        place, _ = call.mem.block_ends(PER)
        sums = running_sum(z, call, "s").gather(1, place.expand(B, -1)[..., None])
        key, query = call.mem.ended_axis(PER), call.query
        blocks = call.mem.ended("b", sums[:, None], PER)[:, 0]
        seen = key.order[:, None] <= query.order[:, :, None]
        if key.doc is not None:
            seen = seen & (key.doc[:, None] == query.doc[:, :, None])
        return (seen.to(z.dtype) @ blocks).expand(B, -1, 1)

    found = in_pieces(run, z, ids, split, slots)
    for b, places in documents(ids):
        for i, t in enumerate(places):
            ends = [places[: e + 1] for e in range(i + 1) if (e + 1) % PER == 0]
            expected = sum((z[b, end].sum() for end in ends), torch.zeros(()).double())
            torch.testing.assert_close(found[b, t, 0], expected)


@pytest.mark.parametrize("retain", [None, Retain(1, 4)])
@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one", "packed"])
def test_places_go_with_their_keys(ids: Tensor | None, split: tuple[int, ...], retain: Retain | None) -> None:
    """Each key's position is the one that its token was given, in full rows and in rings."""
    cache = build_cache({"k": Slot("rows", (1, 1))}, retain, B, T, torch.float64, "cpu", True)
    given, start = torch.randn(B, T, dtype=torch.float64).cumsum(1), 0
    for size in split:
        here = slice(start, start + size)
        part = None if ids is None else ids[:, here]
        ctx = Context(segment_ids=part, positions=given[:, here])
        line = timeline.read(ctx, B, size, given.device, cache.clock)
        memory = Memory(line, cache)
        keys = memory.rows("k", line.compact(given[:, here])[:, None, :, None])[:, 0, :, 0]
        places, axis = memory.places(), memory.axis()
        live = torch.ones_like(keys, dtype=torch.bool)
        if axis.doc is not None:
            doc = torch.zeros_like(line.order) if line.doc is None else line.doc
            live = (axis.doc[:, None] == doc[:, :, None]).any(1).expand(B, -1)
        assert torch.equal(places.expand(B, -1)[live], keys[live])
        line.advance()
        start += size
