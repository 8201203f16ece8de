"""Sequences cut over real processes: losses, gradients and validation are those of one process."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attnzoo
from attnzoo import Collector
from attnzoo.data import IGNORED
from attnzoo.parallel.context import Span, connect
from attnzoo.train.objective import NextToken
from children import start_ranks

pytestmark = [pytest.mark.slow, pytest.mark.multi]

VOCAB, LENGTH = 17, 24
# one border on the edge of a part, one document over all parts, padding over a whole part
IDS = torch.tensor(
    [(1,) * 12 + (2,) * 12, (1,) * 3 + (2,) + (3,) * 20, (4,) * 10 + (0,) * 14, (5,) * 22 + (6,) * 2]
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("mha", {}),
    "latent": ("mla", {}),
    "window": ("gqa", {"num_kv_heads": 2, "window": 5}),
    "long window": ("gqa", {"num_kv_heads": 2, "window": 15}),
    "routed": ("moh", {}),
    "summaries": ("recurrent_memory_chunked", {"chunk": 4, "mem_slots": 2}),
    "linear": ("linear", {"chunk_size": 4}),
    "delta rule": ("gated_deltanet", {"chunk_size": 4}),
    "several states": ("rala", {"pos": "none", "chunk_size": 4}),
    "pyramid": ("mano", {"levels": 3, "window": 4}),
    "long convolution": ("spectformer", {"alpha": 1}),
    "branches": ("hymba", {"window": 5, "num_meta_tokens": 2, "state_size": 8}),
    "hybrid": ("gated_deltanet*2,sliding_window", {"window": 4, "chunk_size": 4, "add": ("moh",)}),
}


def build(case: str) -> attnzoo.model.backbone.LanguageModel:
    name, options = CASES[case]
    torch.manual_seed(0)
    model = attnzoo.create_model(name, VOCAB, 16, 3, 4, max_seq_len=LENGTH, **options).double()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.2 * torch.randn_like(param))
    return model


def batch(packed: bool) -> dict[str, Tensor | None]:
    """Without documents the first half has no targets, so that the first of two ranks has no loss."""
    generator = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(VOCAB, IDS.shape, generator=generator) for _ in range(2))
    unseen = IDS == 0 if packed else torch.arange(LENGTH).expand_as(IDS) < LENGTH // 2
    return {
        "tokens": tokens,
        "targets": targets.masked_fill(unseen, IGNORED),
        "segment_ids": IDS if packed else None,
    }


def outcome(case: str, packed: bool, recompute: bool, span: Span | None = None) -> dict[str, Tensor]:
    """What a rank adds to a step and to a validation; their sums over the ranks are what is compared.

    The auxiliary loss is weighed by a rank's own targets, as the training module does.
    """
    model, collector, data = build(case), Collector(), batch(packed)
    objective = NextToken(model)
    if recompute:
        model.run_block = partial(checkpoint, use_reentrant=False)
    nll, count = objective.training(model, data, collector, span)
    auxiliary = 50 * collector.total() * count
    (nll + auxiliary).backward()
    sums = {"nll": nll.detach(), "auxiliary": auxiliary.detach(), "count": count.double()}
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    held_out = objective.validation(model, data, 0, span)
    return sums | grads | {f"validation/{name}": v.double() for name, v in held_out._asdict().items()}


def one_rank(store: str, ranks: int, rank: int, cases: list[tuple], folder: str) -> None:
    dist.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    span, found = connect(rank, ranks), []
    for case in cases:
        parts = outcome(*case, span)
        for value in parts.values():
            dist.all_reduce(value)
        found.append(parts)
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def compare(tmp_path: Path, ranks: int, cases: list[tuple]) -> None:
    store = str(tmp_path / "store")
    children = [
        start_ranks(one_rank, store, ranks, rank, cases, str(tmp_path), ranks=1)[0] for rank in range(ranks)
    ]
    ended = [child.wait() for child in children]
    assert not any(end.returncode for end in ended), "\n".join(end.stderr for end in ended)
    for rank in range(ranks):
        for case, shared in zip(cases, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            alone = outcome(case[0], case[1], False)
            assert shared.keys() == alone.keys(), case
            largest = max(float(value.abs().max()) for value in alone.values())
            for name, value in alone.items():
                gap = float((shared[name] - value).abs().max())
                assert gap <= 1e-9 * float(value.abs().max()) + 1e-12 * largest, (case, name, gap)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_two_processes_train_and_validate_as_one(tmp_path: Path, recompute: bool) -> None:
    compare(tmp_path, 2, [(case, packed, recompute) for case in CASES for packed in (False, True)])


def test_three_processes_train_and_validate_as_one(tmp_path: Path) -> None:
    chosen = ("softmax", "latent", "routed", "long window", "several states", "pyramid", "hybrid")
    compare(tmp_path, 3, [(case, True, case == "hybrid") for case in chosen])
