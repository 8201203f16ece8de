"""The committed profile of synthetic tasks, and the script that writes it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import profile_zoo

    return profile_zoo


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return [row | {"accuracy": float(row["accuracy"])} for row in csv.DictReader(file)]


def test_the_table_is_whole_and_of_one_setting(script) -> None:
    table = rows(script.CSV)
    cells = {(row["variant"], row["task"], row["seed"]) for row in table}
    tasks, seeds = ("mqar", "induction", "parity", "s3"), ("1", "2")
    assert cells == {(v, task, seed) for v in script.VARIANTS for task in tasks for seed in seeds}
    assert len(table) == len(cells) and all(0 <= row["accuracy"] <= 1 for row in table)
    assert len({(row["steps"], row["tokens"], row["torch"]) for row in table}) == 1
    assert all(row["options"] == " ".join(script.OPTIONS.get(row["variant"], ())) for row in table)


def test_what_was_not_met_is_what_the_page_of_benchmarks_says(script) -> None:
    missed = script.report(rows(script.CSV))
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert [text for text, _, _ in script.EXPECTED if text in page] == missed


def test_a_direction_that_did_not_come_out_is_named(script, capsys) -> None:
    found = [
        {"variant": variant, "task": "mqar", "accuracy": accuracy}
        for variant, accuracy in (("mha", 1.0), ("mha", 0.8), ("linear", 0.3), ("linear", 0.4))
    ]
    assert script.report(found) == ["mha solves mqar (at least 95%)"]
    lines = capsys.readouterr().out.splitlines()
    assert "not met  mha solves mqar (at least 95%): mha/mqar 0.900" in lines
    assert "met      linear fails mqar (under 80%): linear/mqar 0.350" in lines
    assert not any("deltanet" in line for line in lines)  # nothing is said about what did not run


def test_finished_runs_are_not_repeated_and_failed_ones_say_why(script, tmp_path: Path, monkeypatch) -> None:
    done, cut = script.Cell("mha", "mqar", 1), script.Cell("mha", "mqar", 2)
    for cell, status in ((done, "completed"), (cut, "stopped")):
        (tmp_path / cell.name).mkdir()
        (tmp_path / cell.name / "summary.json").write_text(json.dumps({"status": status}))
    monkeypatch.setattr(script.jobs, "PROGRAM", "import sys; sys.exit('error: ' + sys.argv[-1])")
    assert script.train(done, tmp_path) == {"status": "completed"}
    assert script.train(cut, tmp_path) == {"error": "error: seed=2"}
