"""Sweeps before anything runs: the grid, ids, labels, mistakes, shares of the machine, states, the search."""

from __future__ import annotations

import copy
import fcntl
import itertools
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hydra.core.config_store import ConfigStore

import attnzoo
from attnzoo.cli import main
from attnzoo.cli.tree import compose, opened
from attnzoo.sweep import commands, owner
from attnzoo.sweep.grid import expand, plain
from attnzoo.sweep.manifest import RUN, TUNE, Cell, Manifest, cell_id, read_manifest, write_manifest
from attnzoo.sweep.owner import LOCK, in_charge
from attnzoo.sweep.plan import plan
from attnzoo.sweep.pool import settle
from attnzoo.sweep.request import read_request
from attnzoo.sweep.slots import Slot, ranks_of, share
from attnzoo.sweep.state import Outcome, locked, read_outcome, state, states, write_outcome
from attnzoo.sweep.tune import tuned, untuned, with_chosen
from attnzoo.train.prepare import model_options
from runs import overrides


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Manifest]:
    """A function: the manifest of a sweep of tiny runs, with nothing written."""
    monkeypatch.chdir(tmp_path)

    def make(*arguments: str) -> Manifest:
        given = {argument.partition("=")[0] for argument in arguments}
        tiny = [o for o in overrides(tmp_path) if o.partition("=")[0] not in given]
        return plan(read_request([*tiny, *arguments]))

    return make


def test_the_grid_is_the_product_of_its_axes(planned: Callable[..., Manifest]) -> None:
    manifest = planned("attention=mha,gqa", "optim.lr=choice(1e-3,3e-3)", "seed=range(1,4)")
    points = [
        (c.config["attention"]["name"], c.config["optim"]["lr"], c.config["seed"]) for c in manifest.cells
    ]
    assert points == list(itertools.product(("mha", "gqa"), (1e-3, 3e-3), (1, 2, 3)))
    assert [cell.seed for cell in manifest.cells] == [point[2] for point in points]
    assert {cell.arm for cell in manifest.cells} == {"mha", "gqa"}
    assert {cell.setting for cell in manifest.cells} == {"optim.lr=0.001", "optim.lr=0.003"}
    assert not Path("runs").exists()


def test_overrides_of_a_cell_compose_its_configuration(planned: Callable[..., Manifest]) -> None:
    """So `attnzoo train` repeats a cell; matched sizes and searched rates included."""
    grid = ("attention=mha,mla", "seed=1,2", "match=params", "tune=lr", "tune.lr=[1e-3,2e-3]", "tune.seed=7")
    for cell in planned(*grid).cells:
        with opened():
            again = plain(compose(["run_dir=.", *cell.overrides]))
        assert again == cell.config


def test_ids_do_not_depend_on_the_order_of_axes(planned: Callable[..., Manifest]) -> None:
    axes = ("attention=mha,gqa", "seed=1,2", "attention.window=4,8")
    sets = [{(c.id, c.arm, c.setting) for c in planned(*order).cells} for order in (axes, axes[::-1])]
    assert sets[0] == sets[1] and len({name for name, _, _ in sets[0]}) == 8


def test_ids_change_with_what_changes_the_result_only(planned: Callable[..., Manifest]) -> None:
    def name(*arguments: str) -> str:
        (cell,) = planned("attention=mha", *arguments).cells
        return cell.id

    first = name()
    assert first.startswith("mha-s1-")
    same = ("callbacks.checkpoint.every=2", "launcher.devices=2", "data.num_workers=1", "name=other")
    assert {name(argument) for argument in same} == {first}
    other = ("seed=2", "optim.lr=1e-4", "trainer.max_steps=5", "attention.window=8", "data.seq_len=16")
    assert len({first, *(name(argument) for argument in other)}) == 1 + len(other)


@pytest.mark.parametrize(
    ("arguments", "arms", "settings"),
    [
        (["attention=mha,gqa"], ["mha", "gqa"], [""]),
        (["attention=gqa", "attention.num_kv_heads=1,2"], ["gqa num_kv_heads=1", "gqa num_kv_heads=2"], [""]),
        (["attention=gqa", "attention.num_kv_heads=1"], ["gqa"], [""]),
        (["model.layout=mha,'gla*1,mha'"], ["mha", "gla*1,mha"], [""]),
        (["attention=mha", "model.dim=16,32", "data.seq_len=32,16"], ["mha"],
         [f"data.seq_len={t} model.dim={d}" for d in (16, 32) for t in (32, 16)]),
        (["attention=mha", "optim.lr=1e-6,1e-5"], ["mha"], ["optim.lr=1e-06", "optim.lr=1e-05"]),
        (["attention=mha", "optim.lr=1e-6,1e-5", "tune=lr"], ["mha"], [""]),
    ],
)  # fmt: skip
def test_labels_show_what_differs(
    planned: Callable[..., Manifest], arguments: list[str], arms: list[str], settings: list[str]
) -> None:
    cells = planned(*arguments).cells
    assert list(dict.fromkeys(cell.arm for cell in cells)) == arms
    assert list(dict.fromkeys(cell.setting for cell in cells)) == settings


def test_an_experiment_brings_axes_that_the_command_line_may_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"attention": "mha,gqa", "attention.window": "4,8", "seed": "range(1,3)"}
    node = {"hydra": {"sweeper": {"params": params}}, "trainer": {"max_steps": 3}}
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", copy.deepcopy(store.repo))
    store.store(group="experiment", name="swept", package="_global_", node=node)
    tiny = [o for o in overrides(tmp_path) if not o.startswith(("attention=", "trainer.max_steps"))]
    cells, _ = expand([*tiny, "experiment=swept", "seed=7"])
    arms = [f"{name} window={width}" for name in ("mha", "gqa") for width in (4, 8)]
    assert [(cell.arm, cell.seed) for cell in cells] == [(arm, 7) for arm in arms]
    assert {cell.config["trainer"]["max_steps"] for cell in cells} == {3}


MISTAKES = {
    "attention=mha,mlla": ["attention", "'mlla'", "did you mean"],
    "attention=mha,gqa attention.num_kv_heads=3": ["num_kv_heads", "(in mha)"],
    "attention=gqa attention.num_kv_heads=1,3": ["num_kv_heads", "3", "(in gqa num_kv_heads=3)"],
    "attention=": ["attention"],
    "seed=range(2,2)": ["seed", "no value", "empty"],
    "seed=1,1": ["2 cells are the same", "mha seed=1"],
    "seed=1,x": ["seed", "whole number", "'x'"],
    "seeds=2 seed=1": ["seeds", "excludes"],
    "seeds=0": ["seeds", "at least 1", "'0'"],
    "modle.dim=8,16": ["modle.dim", "model.dim"],
    "optim.lr=1e-3,-1": ["optim.lr", "at least 0", "-1"],
    "optim.lr=interval(0,1)": ["optim.lr", "list, choice, range or glob"],
    "attention=mha,gqa model.layout=gqa": ["2 cells are the same", "gqa seed=1"],
    "callbacks.checkpoint.every=2,3": ["same configuration", "every=2", "every=3"],
    "baseline=mla": ["baseline", "'mla'", "mha"],
    "name=a/b": ["name", "'a/b'"],
    "name=..": ["name", "'..'"],
    "name=x name=y": ["name", "twice"],
    "match=size": ["match", "params", "'size'"],
    "match.by=dim": ["match.by", "match="],
    "match.bye=dim match=params": ["match.bye", "match.by"],
    "tune=wd": ["tune", "lr", "'wd'"],
    "tune.lr=[1e-3]": ["tune.lr", "tune=lr"],
    "tune=lr tune.lr=[1e-3,1e-3]": ["tune.lr", "different"],
    "tune=lr tune.lr=[fast]": ["tune.lr", "number", "fast"],
    "jobs=two": ["jobs", "'two'"],
    "run_dir=x": ["run_dir", "name="],
    "hydra.run.dir=x": ["hydra.run.dir", "name="],
    "ckpt_path=x": ["ckpt_path", "resume"],
    "-m": ["-m", "leave it out"],
    "--wiat": ["--wiat", "--wait"],
    "mha": ["no such command", "mha"],
    "launcher=slurm,local": ["launcher", "same"],
    "launcher=slurm jobs=2": ["jobs", "array_parallelism"],
    "launcher=slurm launcher.slurm.partion=x": ["partion"],
    "launcher.num_nodes=2": ["launcher.num_nodes", "slurm"],
    "launcher.devices=[0,1]": ["launcher.devices", "[0, 1]"],
    "data.path=nowhere": ["nowhere"],
}  # fmt: skip


@pytest.mark.parametrize("arguments", MISTAKES, ids=str)
def test_mistakes_are_one_line_and_nothing_is_written(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    given = arguments.split()
    keys = {argument.partition("=")[0] for argument in given}
    tiny = [o for o in overrides(tmp_path / "data") if o.partition("=")[0] not in keys]
    assert main(["sweep", *given, *tiny]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, (out, err)
    assert all(part in err for part in MISTAKES[arguments]), err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_name_that_is_taken_is_refused(planned: Callable[..., Manifest]) -> None:
    write_manifest(planned("name=taken"))
    with pytest.raises(ValueError, match="sweep resume taken"):
        planned("name=taken")


def test_other_commands_name_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("resume", "status", "cancel", "retry-failed"):
        assert main(["sweep", command, "nowhere"]) == 2
        err = capfd.readouterr().err
        assert "nowhere" in err and err.count("\n") == 1
    assert main(["sweep", "resume"]) == 2 and main(["sweep", "status"]) == 0
    (tmp_path / "runs" / "bad").mkdir(parents=True)
    (tmp_path / "runs" / "bad" / "manifest.json").write_text('{"format": 1, "cells"')
    capfd.readouterr()
    assert main(["sweep", "status", "bad"]) == 2
    assert "damaged" in capfd.readouterr().err


def test_a_manifest_reads_back_from_wherever_it_was_moved(
    planned: Callable[..., Manifest], tmp_path: Path
) -> None:
    manifest = planned("attention=mha,gqa", "seeds=2", "match=params", "name=one", "tune=lr")
    write_manifest(manifest)
    assert read_manifest(manifest.folder) == manifest
    moved = manifest.folder.rename(tmp_path / "elsewhere")
    again = read_manifest(moved)
    assert again.cells == manifest.cells and again.run_folder(again.cells[0]).parent == moved / "cells"
    assert "run_dir" in again.cells[0].config and "${run_dir}" in json.dumps(again.cells[0].config["logger"])


@pytest.mark.parametrize("budget", ["params", "train_flops"])
def test_matched_arms_spend_what_the_baseline_does(planned: Callable[..., Manifest], budget: str) -> None:
    def spent(cell: Cell) -> float:
        with torch.device("meta"):
            model = attnzoo.create_model(**model_options(cell.config, 257))
        cost = model.cost(cell.config["data"]["seq_len"])
        return sum(p.numel() for p in model.parameters()) if budget == "params" else cost.train_flops

    manifest = planned("attention=mha,mla,gqa", f"match={budget}", "seeds=2", "model.dim=32")
    assert manifest.baseline == "mha"
    target = next(spent(cell) for cell in manifest.cells if cell.arm == "mha")
    for cell in manifest.cells:
        assert spent(cell) == pytest.approx(target, rel=0.01), cell.arm
        assert (cell.matched is None) == (cell.arm == "mha")
        if cell.matched:
            assert cell.matched["target"] == pytest.approx(target)
            assert cell.matched["value"] == pytest.approx(spent(cell))
    assert manifest.match == {"budget": budget, "by": "auto", "tolerance": 0.01}


def test_an_unsolvable_match_starts_nothing(planned: Callable[..., Manifest]) -> None:
    with pytest.raises(ValueError, match="nearest"):
        planned("attention=mha,mla", "match=params", "match.by=depth", "match.tolerance=1e-6")


@pytest.mark.parametrize("jobs", [None, 1, 2, 3, 8])
@pytest.mark.parametrize("cores", [1, 2, 5, 16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_cores_are_shared_without_overlap(jobs: int | None, cores: int, ranks: int) -> None:
    slots = share(6, jobs, ranks, range(cores))
    used = [core for slot in slots for core in slot.cores]
    assert 1 <= len(slots) <= 6 and all(slot.cores and not slot.gpus for slot in slots)
    assert jobs is None or len(slots) == min(jobs, 6)
    if len(slots) <= cores:
        assert sorted(used) == list(range(cores))
        assert max(len(s.cores) for s in slots) - min(len(s.cores) for s in slots) <= 1
    if jobs is None:
        assert len(slots) * ranks <= max(cores, ranks)


def test_gpus_are_dealt_out() -> None:
    gpus = ("3", "5", "6", "7")
    assert [slot.gpus for slot in share(9, None, 1, range(8), gpus)] == [("3",), ("5",), ("6",), ("7",)]
    assert [slot.gpus for slot in share(9, None, 2, range(8), gpus)] == [("3", "5"), ("6", "7")]
    assert [slot.gpus for slot in share(9, 2, 1, range(8), ("0",))] == [("0",), ("0",)]  # shared on request
    assert len(share(3, None, 1, range(8), gpus)) == 3
    with pytest.raises(ValueError, match=r"launcher.devices.*4 GPUs, got 5"):
        share(1, None, 5, range(8), gpus)
    assert share(1, None, 1, (4, 9)) == [Slot((4, 9))]


def test_ranks_follow_the_devices() -> None:
    def ranks(devices: object, gpus: int = 0) -> int:
        return ranks_of({"launcher": {"num_nodes": 1, "devices": devices}}, gpus)

    assert [ranks(1), ranks(2), ranks("auto"), ranks("auto", 4), ranks(-1, 4)] == [1, 2, 1, 4, 4]


def test_a_manifest_keeps_no_secret(
    planned: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    with pytest.raises(ValueError, match=r"trainer\.sample_prompt: holds a secret"):
        planned("attention=mha,gqa", "trainer.sample_prompt='${oc.env:HF_TOKEN}'")
    with pytest.raises(ValueError, match=r"logger\.jsonl\.api_key: holds a secret") as error:
        planned("attention=mha,gqa", "+logger.jsonl.api_key=hunter2hunter2")
    assert "hunter2" not in str(error.value)
    manifest = planned("attention=mha,gqa", "+logger.jsonl.api_key='${oc.env:HF_TOKEN}'")
    assert "hf_abc" not in repr(manifest)


@pytest.fixture
def written(planned: Callable[..., Manifest]) -> Manifest:
    """A written sweep of four cells."""
    manifest = planned("attention=mha,gqa", "seeds=2", "name=one")
    (manifest.folder / "cells").mkdir(parents=True)
    write_manifest(manifest)
    return manifest


def finish(manifest: Manifest, cell: Cell, **summary: object) -> None:
    """Make the cell's run look complete."""
    folder = manifest.run_folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({"status": "completed", **summary}))


def test_states_come_from_the_folders(written: Manifest) -> None:
    one, two, three, four = written.cells
    assert {outcome.status for outcome in states(written).values()} == {"waiting"}
    finish(written, one)
    written.run_folder(two).mkdir()
    write_outcome(written, three, Outcome("failed", 2, "why", 1))
    with FileLock(written.lock_file(four)):
        assert locked(written.lock_file(four))
        found = states(written)
    assert [found[c.id].status for c in written.cells] == ["done", "stopped", "failed", "running"]
    assert found[three.id].reason == "why"
    assert state(written, four).status == "waiting"
    assert state(written, four, {four.id: "PENDING"}).status == "queued"
    assert state(written, four, {four.id: "RUNNING"}).status == "running"
    write_outcome(written, three, Outcome("done", 0, "", 2))  # says so itself, but there is no summary
    assert state(written, three).status == "waiting"
    assert [cell.id for cell in commands.pending(written)] == [two.id, three.id, four.id]


def test_looks_at_a_lock_disturb_nobody(written: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`attnzoo sweep status` looks at every lock while a sweep goes on."""
    file = written.lock_file(written.cells[0])
    file.touch()
    with file.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not locked(file)
    lock = written.folder / LOCK
    lock.touch()
    looked = threading.Event()
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        sleep = time.sleep

        def until_gone(seconds: float) -> None:  # the taker waits, and then there is nobody
            looked.set()
            fcntl.flock(other, fcntl.LOCK_UN)
            sleep(seconds)

        monkeypatch.setattr(time, "sleep", until_gone)
        with in_charge(written):
            assert looked.is_set() and locked(lock)
            monkeypatch.setattr(time, "sleep", sleep)
            monkeypatch.setattr(owner, "GLANCE", 0.1)
            with (
                pytest.raises(ValueError, match=rf"is running \(process {os.getpid()}\)"),
                in_charge(written),
            ):
                pass


def test_an_end_that_the_process_could_not_record_is_recorded(written: Manifest) -> None:
    cell = written.cells[0]
    written.log_file(cell).parent.mkdir()
    written.log_file(cell).write_text("step 1\nerror: no room; make some\nmore of torchrun's\n")
    assert settle(written, cell, 3, 0, 1.0) == Outcome("failed", 3, "no room; make some", 1, 1.0)
    assert settle(written, cell, -9, 1, 1.0).reason.startswith("killed by SIGKILL")
    assert settle(written, cell, -15, 2, 1.0, stops=(-15,)).status == "stopped"
    assert read_outcome(written, cell).attempts == 3
    write_outcome(written, cell, Outcome("done", 0, "", 4, 9.0))
    assert settle(written, cell, 0, 3, 1.0) == Outcome("done", 0, "", 4, 9.0)  # as it recorded itself


def test_the_search_comes_first_with_a_seed_of_its_own(planned: Callable[..., Manifest]) -> None:
    manifest = planned("attention=mha,gqa", "seed=1,2", "tune=lr", "optim.lr=1e-2")
    assert {cell.stage for cell in manifest.cells} == {TUNE} and len(manifest.cells) == 6
    assert {cell.seed for cell in manifest.cells} == {3} == {cell.config["seed"] for cell in manifest.cells}
    assert manifest.tune["lr"] == [3.33e-3, 1e-2, 3e-2]
    assert len(manifest.tune["runs"]) == 4
    swept = planned("attention=mha", "tune=lr", "optim.lr=1e-2,1e-3,5e-3", "tune.seed=1")
    assert [cell.config["optim"]["lr"] for cell in swept.cells] == [1e-3, 5e-3, 1e-2]


def search(planned: Callable[..., Manifest]) -> Manifest:
    """A written search of two arms and three rates."""
    manifest = planned("attention=mha,gqa", "seed=1,2", "tune=lr", "tune.lr=[0.1,0.2,0.4]", "name=one")
    (manifest.folder / "cells").mkdir(parents=True)
    write_manifest(manifest)
    return manifest


def test_the_best_rate_of_each_arm_makes_its_runs(planned: Callable[..., Manifest]) -> None:
    manifest = search(planned)
    mha, gqa = manifest.cells[:3], manifest.cells[3:]
    assert with_chosen(manifest) is manifest
    for cell, bits in zip(mha[:2], (3.0, 2.0), strict=True):
        finish(manifest, cell, val_bpb=bits, tokens=10, train_flops_per_token=5.0, seconds=2.0)
    assert with_chosen(manifest) is manifest  # one rate is still to come
    write_outcome(manifest, mha[2], Outcome("failed", 1, "diverged", 1))
    manifest = with_chosen(manifest)
    runs = [cell for cell in manifest.cells if cell.stage == RUN]
    assert [(cell.arm, cell.seed, cell.config["optim"]["lr"]) for cell in runs] == [
        ("mha", 1, 0.2),
        ("mha", 2, 0.2),
    ]
    assert all(cell.id == cell_id(cell.arm, cell.seed, cell.config) for cell in runs)
    assert with_chosen(manifest) is manifest
    (found,) = tuned(manifest)
    assert (found.lr, found.at_edge, found.grid) == (0.2, False, (0.1, 0.2, 0.4))
    assert found.val == {0.1: 3.0, 0.2: 2.0, 0.4: None}
    assert (found.tokens, found.flops, found.seconds) == (20, 100.0, 4.0)
    for cell, bits in zip(gqa, (1.0, 2.0, 3.0), strict=True):
        finish(manifest, cell, val_bpb=bits)
    manifest = with_chosen(manifest)
    assert {c.config["optim"]["lr"] for c in manifest.cells if c.stage == RUN and c.arm == "gqa"} == {0.1}
    assert [t.at_edge for t in tuned(manifest)] == [False, True] and len(manifest.cells) == 10


def test_accuracy_decides_where_there_are_no_bits(planned: Callable[..., Manifest]) -> None:
    manifest = search(planned)
    for cell, share_right in zip(manifest.cells[:3], (0.2, 0.9, 0.4), strict=True):
        finish(manifest, cell, val_bpb=None, val_accuracy=share_right, val_loss=1.0)
    assert tuned(manifest)[0].lr == 0.2


def test_an_arm_without_any_rate_is_named(planned: Callable[..., Manifest]) -> None:
    manifest = search(planned)
    for cell in manifest.cells[:3]:
        write_outcome(manifest, cell, Outcome("failed", 1, "diverged", 1))
    for cell in manifest.cells[3:]:
        finish(manifest, cell, val_bpb=1.0)
    assert untuned(manifest) == [("mha", "")] and with_chosen(manifest).cells[-1].arm == "gqa"
    assert commands.exit_code(replace(manifest, cells=manifest.cells[:3])) == 1
