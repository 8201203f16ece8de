"""Ranks that share heads compute what one does: every registered variant, in one process, in fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo import Collector, Context
from attnzoo.parallel.plan import split_heads
from attnzoo.parallel.tensor import Share, assemble, norm_weight, shards_of, sync_gradients
from attnzoo.testing.subject import Subject, inputs
from threads import on_ranks

MUST = (
    "mha", "gqa", "mqa", "mla", "tpla", "moh", "kha", "sliding_window", "linear", "gated_deltanet", "retnet",
    "gla", "deltanet", "mamba2", "kda", "lightning_attention", "sqa", "gla_latent", "mtla", "elitekv",
    "kv_shift", "hgrn2",
)  # fmt: skip
IDS = ((1,) * 5 + (2,) + (3,) * 8 + (0,) * 3 + (4,) * 4, (7,) * 4 + (9,) * 17)


def close(ours: Tensor, theirs: Tensor, what: str, tolerance: float = 1e-10) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    size = float(theirs.abs().max()) if theirs.numel() else 0.0
    gap = float((ours - theirs).abs().max()) if theirs.numel() else 0.0
    assert gap <= tolerance * max(size, 1e-3), f"{what} differs by {gap:.1e} of {size:.1e}"


class Result:
    """What a forward and backward of one rank gave."""

    def __init__(self, mixer: nn.Module, x: Tensor, ids: Tensor | None, share: Share | None = None) -> None:
        x = x.clone().requires_grad_()
        collector = Collector()
        self.y = mixer(x, Context(segment_ids=ids, collector=collector))
        self.aux = collector.total()
        ((self.y * inputs(seed=3)).sum() + 30 * self.aux).backward()
        if share is not None:
            sync_gradients(mixer, share)
        share = share or Share(0, 1)
        self.x_grad, self.grads, self.square = x.grad, {}, torch.zeros((), dtype=x.dtype)
        for name, p in mixer.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.square += (norm_weight(p, share.ranks) * grad.square()).sum()
            self.grads[name] = assemble(grad, getattr(p, "shards", None), share)
        marks = shards_of(mixer)
        state = mixer.state_dict().items()
        self.state = {name: assemble(value, marks.get(name), share) for name, value in state}
        self.local = sum(p.numel() for p in mixer.parameters())


def compare(full: nn.Module, ranks: int, packs: bool = True) -> None:
    """A rank of several against one."""
    x, ids = inputs(), torch.tensor(IDS) if packs else None
    parts = [copy.deepcopy(full) for _ in range(ranks)]

    def run(rank: int, group: Any) -> Result:
        share = Share(rank, ranks, group)
        split_heads(parts[rank], share)
        return Result(parts[rank], x, ids, share)

    alone, found = Result(full, x, ids), on_ranks(ranks, run)
    for result in found:
        close(result.y, alone.y, "y")
        close(result.aux, alone.aux, "the auxiliary loss")
        close(result.x_grad, alone.x_grad, "the gradient of x")
        assert result.grads.keys() == alone.grads.keys()
        for name, grad in alone.grads.items():
            close(result.grads[name], grad, f"the gradient of {name}")
        assert result.state.keys() == alone.state.keys()
        for name, value in alone.state.items():
            assert torch.equal(result.state[name], value), f"{name} is another when put together"
    close(sum(result.square for result in found), alone.square, "the squared norm of the gradients")


@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_ranks_equal_one(name: str) -> None:
    for case, subject in Subject.cases(name).items():
        mixer = subject.mixer()
        try:
            split_heads(copy.deepcopy(mixer), Share(0, 2))
        except ValueError as error:
            assert name not in MUST, f"{case}: {error}"
            assert str(error).startswith("launcher.tensor_parallel: ")
            continue
        compare(mixer, 2, subject.has("packs"))
