"""Whatever the number of ranks and workers, before and after a resumption, a step has the same samples."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from attnzoo.data import TextCorpus
from attnzoo.train.batches import CounterBatches, train_loader
from attnzoo.train.checkpoint import read_checkpoint
from children import run_child, start_ranks
from runs import metrics, train

BATCH, ACCUMULATE, FIRST, LAST = 16, 2, 3, 6
EVERY = ("callbacks.checkpoint.every=2", "callbacks.checkpoint.keep=9", "trainer.accumulate=2")
SPREAD = ("launcher.devices=2", "launcher.strategy=ddp", "launcher.accelerator=cpu")


class Counters(Dataset):
    """A corpus whose tokens are the counters of its samples."""

    def train_dataset(self, start: int, stop: int) -> Counters:
        return self

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        return {
            "tokens": torch.tensor([n, n]),
            "segment_ids": torch.ones(2, dtype=torch.long),
            "target_bytes": torch.tensor(1),
        }


def served(workers: int, rank: int, world: int, offset: int = 0) -> list[list[int]]:
    """The samples of one rank's micro-batches, as the loader of a run gives them."""
    batches = CounterBatches(FIRST, LAST, BATCH, ACCUMULATE, rank, world, offset)
    return [batch["tokens"][:, 0].tolist() for batch in train_loader(Counters(), batches, workers)]


@pytest.mark.parametrize("offset", [0, -24])
def test_ranks_together_see_what_one_sees(offset: int) -> None:
    alone = [
        [offset + step * BATCH + micro * BATCH // ACCUMULATE + i for i in range(BATCH // ACCUMULATE)]
        for step in range(FIRST, LAST)
        for micro in range(ACCUMULATE)
    ]
    for workers, world in ((0, 1), (2, 1), (0, 2), (0, 4), (2, 4)):
        ranks = [served(workers, rank, world, offset) for rank in range(world)]
        together = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]  # rank after rank
        assert together == alone, (workers, world)


def watched(folder: Path, name: str, *options: str) -> None:
    """A rank of a run, which writes down the samples of each step."""
    sample = TextCorpus.sample
    file = folder / f"{name}-seen-{os.environ.get('RANK', '0')}"

    def written(self: TextCorpus, n: int) -> dict[str, torch.Tensor]:
        with file.open("a") as seen:
            seen.write(f"{n}\n")
        return sample(self, n)

    TextCorpus.sample = written
    train(folder, *options, name=name)


def seen(folder: Path, name: str, size: int = 4) -> list[list[int]]:
    """The samples of each step, over all ranks; ``size`` of them."""
    ranks = [[int(n) for n in file.read_text().split()] for file in sorted(folder.glob(f"{name}-seen-*"))]
    own = size // len(ranks)
    assert len({len(rank) for rank in ranks}) == 1
    return [sorted(n for rank in ranks for n in rank[i : i + own]) for i in range(0, len(ranks[0]), own)]


def run(folder: Path, name: str, ranks: int, *options: str) -> None:
    if ranks == 1:
        ended = [run_child(watched, folder, name, *options, cwd=folder)]
    else:
        ended = [r.wait() for r in start_ranks(watched, folder, name, *SPREAD, *options, cwd=folder)]
    assert all(end.returncode == 0 for end in ended), ended


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on_alike(tmp_path: Path, before: int, after: int) -> None:
    run(tmp_path, "straight", before, *EVERY)
    start = tmp_path / "straight" / "checkpoints" / "step-00000002.pt"
    run(tmp_path, "on", after, *EVERY, f"ckpt_path={start}")
    steps = [list(range(4 * step, 4 * step + 4)) for step in range(4)]
    assert seen(tmp_path, "straight") == steps and seen(tmp_path, "on") == steps[2:]
    there, here = metrics(tmp_path / "straight")[2:], metrics(tmp_path / "on")
    assert [line["step"] for line in here] == [3, 4]
    for a, b in zip(there, here, strict=True):
        for key in ("train_loss", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), (a["step"], key)
        assert a["lr"] == b["lr"] and a["tokens"] == b["tokens"]
    assert here[-1]["val_loss"] == pytest.approx(there[-1]["val_loss"], rel=1e-5)
    one, two = (read_checkpoint(tmp_path / name)["model"] for name in ("straight", "on"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)
