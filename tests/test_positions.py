"""Held-out loss by position, against a loss computed position by position."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from attnzoo import Context, create_model
from attnzoo.data import IGNORED, targets
from attnzoo.parallel.layout import Layout
from attnzoo.parallel.ranks import Ranks
from attnzoo.train.evaluate import Validation
from attnzoo.train.metrics import bucket_edges, loss_by_position
from attnzoo.train.prepare import prepare
from attnzoo.train.run import execute
from runs import compose, metrics


def by_hand(model: nn.Module, samples) -> dict[int, list[float]]:
    """Nats of every target, by its position in the sample."""
    found: dict[int, list[float]] = {}
    for sample in samples:
        tokens, labels, segments = (x[None] for x in targets(sample))
        with torch.no_grad():
            log_p = model(tokens, Context(segment_ids=segments))[0].double().log_softmax(-1)
        for position, label in enumerate(labels[0].tolist()):
            if label != IGNORED:
                found.setdefault(position, []).append(-log_p[position, label].item())
    return found


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 100, 1024])
def test_edges_double_and_cover_every_position_once(length: int) -> None:
    edges = bucket_edges(length)
    assert edges[0] == 0 and edges[-1] == length and sorted(set(edges)) == edges
    assert all(edge == 2**i for i, edge in enumerate(edges[1:-1]))
    assert all(after <= 2 * max(edge, 1) for edge, after in pairwise(edges))


def test_a_bucket_without_targets_has_no_loss() -> None:
    nll, count = torch.tensor([0.0, 3.0, 4.0, 8.0, 5.0]), torch.tensor([0, 1, 1, 2, 5])
    assert loss_by_position(nll, count) == {"edges": [0, 1, 2, 4, 5], "loss": [None, 3.0, 4.0, 1.0]}


@pytest.mark.parametrize("isolate", ["true", "false"])
def test_loss_by_position_is_that_of_each_position(tmp_path: Path, isolate: str) -> None:
    options = ("data.seq_len=24", f"data.isolate={isolate}", "data.val_samples=7", "trainer.val_every=2")
    run = prepare(compose(tmp_path, *options))
    summary = execute(run)
    found = by_hand(run.model.eval(), run.corpus.validation())
    edges, losses = summary["val_loss_by_position"].values()
    assert edges == [0, 1, 2, 4, 8, 16, 24]
    total = number = 0.0
    for (start, end), loss in zip(pairwise(edges), losses, strict=True):
        own = [nll for position in range(start, end) for nll in found.get(position, ())]
        assert loss == pytest.approx(sum(own) / len(own), rel=1e-5)
        total, number = total + loss * len(own), number + len(own)
    assert total / number == pytest.approx(summary["val_loss"], rel=1e-9)
    assert json.loads((run.folder / "summary.json").read_text())["val_loss_by_position"] == {
        "edges": edges,
        "loss": losses,
    }
    assert summary["val_accuracy"] is None and summary["val_bpb"] > 0
    assert all("val_loss_by_position" not in line for line in metrics(run.folder))  # numbers only


def test_an_objective_without_an_order_has_no_positions(tmp_path: Path) -> None:
    _, summary = prepare_and_run(tmp_path, "attention=efficient_dlm", "trainer.max_steps=1")
    assert summary["val_loss_by_position"] is None and summary["val_accuracy"] is None
    assert summary["val_bpb"] > 0


def prepare_and_run(folder: Path, *options: str):
    run = prepare(compose(folder, *options))
    return run, execute(run)


def make_samples(labelled: bool) -> list[dict[str, torch.Tensor]]:
    """Seven of different documents and lengths of padding, so that no two ranks hold equal sums."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(7):
        tokens = torch.randint(11, (10 - labelled,), generator=generator)
        segments = torch.ones_like(tokens)
        segments[4 + i % 4 :] = 2 * (i % 2)
        sample = {"tokens": tokens, "segment_ids": segments, "target_bytes": torch.tensor(3 * i + 1)}
        if labelled:
            sample |= {"labels": tokens.roll(1), "target_bytes": torch.tensor(0)}
        samples.append(sample)
    return samples


def validate(rank: int, world: int, labelled: bool) -> dict:
    torch.manual_seed(1)
    model = create_model("mha", vocab_size=11, dim=8, depth=1, num_heads=2)
    nn.init.normal_(model.head.weight)
    validation = Validation(make_samples(labelled), 2, Ranks(Layout(world, rank)))
    return validation.run(model, torch.device("cpu"), torch.no_grad)


def one_rank(rank: int, store: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = [validate(rank, 2, labelled) for labelled in (False, True)]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.mark.multi
def test_two_ranks_report_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        for labelled, shared in enumerate(json.loads((tmp_path / f"{rank}.json").read_text())):
            alone = validate(0, 1, bool(labelled))
            assert shared.keys() == alone.keys()
            assert labelled == (alone["val_loss_by_position"] is None) == (alone["val_accuracy"] is not None)
            for key, value in alone.items():
                if isinstance(value, dict):
                    assert shared[key]["edges"] == value["edges"]
                    assert shared[key]["loss"] == pytest.approx(value["loss"], rel=1e-6)
                else:
                    assert shared[key] == (None if value is None else pytest.approx(value, rel=1e-6))
