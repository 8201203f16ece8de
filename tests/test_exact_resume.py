"""N steps are k steps, `kill -9` and the rest, bit for bit, wherever the kill falls."""

from __future__ import annotations

from pathlib import Path

import pytest

from exact_resume import EDGE, OPTIONS, Cell, all_pairs, covering_array, differences, full_matrix, run_cell
from runs import compose, train

CELLS = covering_array()


def test_the_cells_cover_every_pair() -> None:
    assert len(CELLS) <= 16 and len(set(CELLS)) == len(CELLS)
    assert set.union(*(cell.pairs() for cell in CELLS)) == all_pairs()
    assert len(all_pairs()) == 3 * 8 + 3 * 4 + 10 * 6
    assert len(set(full_matrix())) == 4 * 2 * 2 * 2 * 6


def test_an_epoch_ends_within_the_run(tmp_path: Path) -> None:
    from attnzoo.train.prepare import prepare

    run = prepare(compose(tmp_path, *OPTIONS))
    first = run.corpus.sampler.samples_per_epoch
    assert EDGE * run.plan.batch_size <= first < (EDGE + 1) * run.plan.batch_size


def test_another_run_is_told_apart(tmp_path: Path) -> None:
    short = (*OPTIONS, "trainer.max_steps=2")
    train(tmp_path, *short, name="one")
    train(tmp_path, *short, name="two")
    train(tmp_path, *short, "optim.lr=0.0020001", name="other")
    told = differences(tmp_path / "one", tmp_path / "two")
    assert told == ["2, 2 reports"]  # a whole run has more
    told = " ".join(differences(tmp_path / "one", tmp_path / "other"))
    assert "model: " in told and "optimizer: " in told and "step 2: " in told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exact")


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_killed_run_ends_as_if_nothing_had_happened(cell: Cell, folder: Path) -> None:
    result = run_cell(cell, folder)
    assert result["differences"] == [], result
