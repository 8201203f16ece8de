"""The committed tables are those of this state of the code: the zoo's page, the matrix of compositions."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

import attnzoo
from attnzoo.testing.subject import DIM, HEADS, Subject

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("page", "script"), [("zoo", "zoo_table"), ("parallel", "parallel_table")])
def test_the_written_pages_are_current(page: str, script: str) -> None:
    command = [sys.executable, f"scripts/{script}.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"docs/{page}.md is not what {script}.py writes; {done.stderr[-500:]}"


def test_every_variant_was_trained_and_learned() -> None:
    table = rows("train-all.csv")
    assert sorted(row["variant"] for row in table) == attnzoo.list_variants()
    assert {row["verdict"] for row in table} == {"learns"}


def test_the_matrix_of_compositions_is_whole_and_refuses_as_it_says(monkeypatch) -> None:
    """Whether the passing pairs pass is for scripts/pairs.py; here, that they build and the others do not."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from attnzoo import registry

    attnzoo.list_variants()
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    sys.modules.pop("pairs", None)  # it registers its normaliser when it is imported
    from pairs import PARTNERS

    table = rows("pairs.csv")
    names = [n for n in attnzoo.list_variants() if n != "off_by_one"]
    assert sorted((row["variant"], row["partner"]) for row in table) == sorted(
        (name, partner) for name in names for partner in PARTNERS
    )
    for row in table:
        name, partner = row["variant"], PARTNERS[row["partner"]]
        reasons = []
        for options in ({**attnzoo.card(name).small, **partner}, partner):
            try:
                Subject.of(name, attnzoo.card(name).layers, **options).make(DIM, HEADS, **options)
                break
            except ValueError as error:
                reasons.append(str(error))
        assert row["result"] == ("refused" if len(reasons) == 2 else "passes"), row
        assert row["result"] == "passes" or reasons[-1] == row["reason"], row
