"""`attnzoo compare` as a user types it: folders, sweeps, and a sweep that it runs itself."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnzoo.cli import main
from attnzoo.compare.comparison import compare
from attnzoo.compare.select import from_folders, from_sweep
from attnzoo.compare.statistics import Method
from attnzoo.sweep import commands
from attnzoo.sweep.manifest import Cell, Manifest, read_manifest, write_manifest
from attnzoo.sweep.state import Outcome, write_outcome
from run_folders import run_folder
from runs import train

VALUES = {"mha": [2.0, 2.02, 1.99], "mla": [1.9, 1.93, 1.885], "gqa": [1.99, 2.05, 2.0]}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def folders(root: Path = Path("made")) -> list[Path]:
    return [
        run_folder(root / f"{name}-{seed}", name, seed, bpb)
        for name, every in VALUES.items()
        for seed, bpb in enumerate(every, 1)
    ]


def sweep(
    *more: Cell,
    missing: tuple[str, ...] = (),
    seeds: int = 3,
    matched: dict[str, Any] | None = None,
    baseline: str | None = None,
    tune: dict[str, Any] | None = None,
) -> Manifest:
    """The sweep runs/s, whose cells are done but for ``missing`` and ``more``."""
    cells = [
        Cell(f"{arm}-s{seed}", "run", arm, "", seed, (), {}, None if arm == "mha" else matched)
        for arm in VALUES
        for seed in range(1, seeds + 1)
    ]
    command, launcher = ("attention=mha,mla,gqa", "name=s"), {"name": "local", "jobs": 2}
    start = (Path("runs/s"), "s", "2026-01-01", ".", command)
    manifest = Manifest(*start, baseline, None, tune, launcher, (*cells, *more))
    write_manifest(manifest)
    for cell in cells:
        if cell.id not in missing:
            run_folder(manifest.run_folder(cell), cell.arm, cell.seed, VALUES[cell.arm][cell.seed - 1])
    return manifest


def loaded(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "comparison.json").read_text())


def test_folders_become_a_table_and_three_files(capsys: pytest.CaptureFixture) -> None:
    command = ["compare", *map(str, folders()), "nowhere", "--out", "out", "--baseline", "gqa"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.index("left out: nowhere: does not exist") < out.index("Validation bits per byte")
    assert "better" in out and "seeds needed" in out
    assert out.splitlines()[-3:] == [
        f"wrote out/{n}" for n in ("comparison.json", "comparison.csv", "report.html")
    ]
    found = loaded(Path("out"))
    assert found["baseline"] == "gqa" and found["command"].startswith("attnzoo compare made/mha-1 ")
    assert "mla" in (Path("out") / "report.html").read_text()
    with open("out/comparison.csv", newline="") as file:
        rows = {(row["arm"], row["metric"]): row for row in csv.DictReader(file)}
    assert len(rows) == 3 * len(found["settings"][0]["metrics"])
    row = rows["mla", "val_bpb"]
    assert [float(row[f"seed {n}"]) for n in (1, 2, 3)] == VALUES["mla"]
    assert row["verdict"] == "better" and row["unit"] == "bits/byte"


def test_without_a_folder_for_the_results_they_go_under_runs(capsys: pytest.CaptureFixture) -> None:
    made = [str(path) for path in folders()]
    before = {path: path.stat().st_mtime_ns for path in Path("made").rglob("*")}
    assert main(["compare", *made, "--interval", "bootstrap", "--correction", "none", "--level", "0.9"]) == 0
    (folder,) = Path("runs").glob("compare-*")
    method = loaded(folder)["method"]
    assert (method["interval"], method["correction"], method["level"]) == ("bootstrap", "none", 0.9)
    assert "BCa" in method["text"] and "not corrected" in method["text"]
    assert "3 seeds are too few for the bootstrap" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("made").rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "runs: none is usable; nowhere: does not exist"),
        (["made/mha-1", "--level", "2"], "--level: must be"),
        (["made/mha-1", "--interval", "exact"], "--interval: must be"),
        (["made/mha-1", "--baseline", "gau"], "--baseline: must be one of the arms mha, got 'gau'"),
        (["made/mha-1", "other"], "runs: not comparable; steps: 4 in made/mha-1; 5 in other; --force"),
        (["sweep", "nowhere"], "nowhere"),
        ([], "runs"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture
) -> None:
    folders()
    run_folder(Path("other"), "mla", steps=5)
    assert main(["compare", *arguments]) == 2
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1
    assert not Path("runs").exists()


def test_forced_differences_stand_on_top(capsys: pytest.CaptureFixture) -> None:
    made = [str(path) for path in folders()]
    run_folder(Path("other"), "mqa", steps=5)
    assert main(["compare", *made, "other", "--force", "--out", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("NOT COMPARABLE, forced: steps: 4 in mha, mla, gqa; 5 in mqa")
    assert "steps: 4 in mha" in (Path("out") / "report.html").read_text()


def test_a_sweep_is_compared_in_its_folder(capsys: pytest.CaptureFixture) -> None:
    manifest = sweep(missing=("gqa-s2", "gqa-s3"), baseline="mla")
    write_outcome(manifest, manifest.cell("gqa-s2"), Outcome("failed", 1, "the loss is not finite", 1, 2.0))
    assert main(["compare", "sweep", "s"]) == 0
    found = loaded(Path("runs/s"))
    assert found["baseline"] == "mla" and found["title"] == "Sweep s"
    assert {Path(one["folder"]).name: one["reason"] for one in found["left_out"]} == {
        "gqa-s2": "failed: the loss is not finite",
        "gqa-s3": "has not run yet",
    }
    assert any("shared the machine" in note for note in found["notes"])
    assert "left out: runs/s/cells/gqa-s2: failed: the loss is not finite" in capsys.readouterr().out
    assert main(["compare", "sweep", "runs/s", "--baseline", "mha"]) == 0  # again, over the first
    assert loaded(Path("runs/s"))["baseline"] == "mha"


def test_a_sweep_of_which_nothing_is_done_is_an_error(capsys: pytest.CaptureFixture) -> None:
    manifest = sweep(missing=tuple(f"{arm}-s1" for arm in VALUES), seeds=1)
    assert main(["compare", "sweep", "s"]) == 2
    assert "sweep s: no run is usable" in capsys.readouterr().err
    assert not (manifest.folder / "comparison.json").exists()


def test_what_a_match_solved_is_told_and_tells_no_arms_apart() -> None:
    matched = {"budget": "params", "target": 1000, "value": 1004, "knob": "model.mlp_hidden + model.depth",
               "from": [None, 2], "to": [40, 3], "deviation": 0.004}  # fmt: skip
    manifest = sweep(Cell("mla-s2", "run", "mla", "", 2, (), {}, matched), matched=matched, seeds=1)
    solved = {"model.mlp_hidden": 40, "model.depth": 3}
    changed = run_folder(Path("runs/s/cells/mla-s2"), "mla", 2, config=solved, params=1004)
    found = compare(from_sweep(manifest.folder), Method())
    arms = {arm["label"]: arm for arm in found["arms"]}
    assert arms["mla"]["matched"] == matched and arms["mla"]["seeds"] == [1, 2]
    (params,) = (r for r in found["settings"][0]["results"] if (r["arm"], r["metric"]) == ("mla", "params"))
    assert (params["verdict"], params["reason"]) == ("equal", "the budget that was matched")
    named = [Path("runs/s/cells") / name for name in ("mha-s1", "mla-s1", "mla-s2")]
    assert sorted({m.arm for m in from_folders(named).members}) == ["mha", "mla"]
    copy = Path("copy")
    changed.rename(copy)  # outside its sweep, nothing says that the size was solved for
    assert len({m.arm for m in from_folders([*named[:2], copy]).members}) == 3


def test_a_search_for_the_learning_rate_is_told() -> None:
    config = {"seed": 9, "optim": {"lr": 0.002}, "attention": {"name": "mha"}}
    searched = [
        Cell(f"tune-mha-{lr}", "tune", "mha", "", 9, (), config | {"optim": {"lr": lr}})
        for lr in (0.001, 0.002)
    ]
    manifest = sweep(*searched, tune={"lr": [0.001, 0.002], "seed": 9, "runs": []})
    for cell, bpb in zip(searched, (2.2, 2.1), strict=True):
        run_folder(manifest.run_folder(cell), "mha", 9, bpb, config={"optim.lr": cell.config["optim"]["lr"]})
    found = compare(from_sweep(manifest.folder), Method())
    (tune,) = (arm["tune"] for arm in found["arms"] if arm["label"] == "mha")
    assert (tune["lr"], tune["grid"], tune["at_edge"]) == (0.002, [0.001, 0.002], True)
    assert tune["val"] == {"0.001": 2.2, "0.002": 2.1}
    assert (tune["tokens"], tune["flops"]) == (1024, 1024 * 6000)
    assert all(arm["seeds"] == [1, 2, 3] for arm in found["arms"])  # no run of the search takes part


def test_one_shot_runs_the_sweep_and_goes_on_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    called: list[Any] = []

    def start(arguments: list[str]) -> tuple[Manifest, int]:
        called.append(("start", arguments))
        return sweep(), 1

    def resume(folder: Path, jobs: int | None, wait: bool) -> tuple[Manifest, int]:
        called.append(("resume", folder, jobs, wait))
        return None, code

    code = 0
    monkeypatch.setattr(commands, "start", start)
    monkeypatch.setattr(commands, "resume", resume)
    arguments = ["attention=mha,mla,gqa", "name=s"]
    assert main(["compare", *arguments]) == 1  # of the sweep, a cell of which failed
    assert loaded(Path("runs/s"))["command"] == "attnzoo compare attention=mha,mla,gqa name=s"
    assert main(["compare", *reversed(arguments), "jobs=3", "--baseline", "mla"]) == 0
    assert called == [
        ("start", [*arguments, "--wait"]),
        ("resume", Path("runs/s"), 3, True),
    ]
    assert loaded(Path("runs/s"))["baseline"] == "mla"
    assert main(["compare", "attention=mha", "name=s"]) == 2  # another sweep under this name
    assert "name: s is another sweep" in capsys.readouterr().err
    code = 130
    (Path("runs/s") / "comparison.json").unlink()
    assert main(["compare", *arguments]) == 130
    assert not (Path("runs/s") / "comparison.json").exists()  # interrupted: there is nothing to compare yet
    assert main(["compare", *arguments, "--interval", "z"]) == 2 and len(called) == 3
    matched = [*arguments, "match=params"]  # whose sizes depend on the baseline
    found = read_manifest(Path("runs/s"))
    write_manifest(replace(found, command=tuple(matched), match={"budget": "params"}, baseline="mha"))
    assert main(["compare", *matched, "--baseline", "gqa"]) == 2 and len(called) == 3
    code = 0
    assert main(["compare", *matched, "--baseline", "mha"]) == 0 and len(called) == 4


def test_a_baseline_that_is_not_in_the_set_is_told_before_anything_is_trained(
    capsys: pytest.CaptureFixture,
) -> None:
    assert main(["compare", "attention=mha,mla", "name=s", "--baseline", "gqa"]) == 2
    assert "baseline: must be an arm of the sweep, got 'gqa'" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_two_real_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("mha", "mla"):
        for seed in (1, 2):
            train(tmp_path, f"attention={name}", f"seed={seed}", "trainer.max_steps=2", name=f"{name}{seed}")
    names = [f"{name}{seed}" for name in ("mha", "mla") for seed in (1, 2)]
    assert main(["compare", *names, "--out", "out"]) == 0
    found = loaded(Path("out"))
    (setting,) = found["settings"]
    keys = {metric["key"] for metric in setting["metrics"]}
    assert {"val_bpb", "val_loss", "context_gain", "cache_bytes", "decode_ms", "seconds"} <= keys
    for row in setting["results"]:
        run = json.loads((Path(f"{row['arm']}1") / "summary.json").read_text())
        if row["metric"] in ("val_bpb", "params", "seconds"):
            assert row["values"]["1"] == run[row["metric"]]
    assert found["forced"] == found["left_out"] == []
    assert len(setting["curves"]) == 4 and setting["decode"][0]["context"] == [8, 16, 32]


def test_the_command_is_light_until_it_runs() -> None:
    look = "print([n for n in ('rich', 'scipy', 'plotly', 'omegaconf', 'lightning') if n in sys.modules])"
    program = f"import sys; from attnzoo.cli import main; main(['list', 'mha']); {look}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
