"""The tables of a comparison as text."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from attnzoo.compare.terminal import show, si
from run_folders import MHA, MLA, arms, compared, run_folder, task_folder


def shown(folders: list[Path], width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    show(compared(*folders), console)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_and_are_plain_text_without_a_terminal(tmp_path: Path, width: int) -> None:
    made = arms(tmp_path, mha=MHA, mla=MLA, gqa=[1.99, 2.05, 2.0])
    made += [
        run_folder(tmp_path / f"one{seed}", "gqa", seed, attention={"num_kv_heads": 1}) for seed in (1, 2, 3)
    ]
    text = shown(made, width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    tables = text.partition("Claims of the papers")[0]
    rows = [line for line in tables.splitlines() if line.startswith(" mla ")]
    assert len(rows) == 2 and "better" in rows[0] and "1.9050 ± 0.0229" in rows[0]
    assert (rows[0].count("[") == 1) == (width == 120)  # on its own line where there is no room


def test_many_tasks_are_shown_as_a_profile(tmp_path: Path) -> None:
    made = [
        task_folder(tmp_path, task, variant, seed, accuracy + seed / 100)
        for task in ("mqar", "parity", "s3", "induction")
        for seed in (1, 2)
        for variant, accuracy in (("mha", 0.9), ("linear", 0.2))
    ]
    text = shown(made, 80)
    (row,) = (line for line in text.splitlines() if line.lstrip().startswith("mqar"))
    assert row.split() == ["mqar", "91.5", "21.5-"]
    assert "Cost" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(999, "999"), (1000, "1k"), (999_600, "1M"), (1_234_567, "1.23M"), (0.5, "0.5"), (2.5e12, "2.5T")],
)
def test_numbers_in_three_digits(value: float, text: str) -> None:
    assert si(value) == text
