"""Sweeps on a real SLURM: `scripts/local_slurm.sh` starts one; without one these tests are skipped."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from attnzoo.sweep import commands, slurm
from attnzoo.sweep.state import locked, read_outcome
from runs import train
from sweeps import check_two_ranks, manifest, statuses, steps, sweep, tiny, until

LONG = 300  # steps: some seconds, in which to be interrupted
HERE = (
    "launcher=slurm",
    "launcher.accelerator=cpu",
    "launcher.slurm.cpus_per_task=1",
    "launcher.slurm.time=30",
)


def missing() -> str | None:
    """Why there is no SLURM to submit to, None if there is one."""
    if importlib.util.find_spec("submitit") is None:
        return "submitit is not installed"
    if shutil.which("sinfo") is None:
        return "no SLURM is installed; scripts/local_slurm.sh installs and starts one"
    asked = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=False)
    if not {"idle", "mixed", "allocated"} & set(asked.stdout.split()):
        return "SLURM has no usable node; scripts/local_slurm.sh starts one"
    return None


REASON = missing()
pytestmark = [pytest.mark.multi, pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(autouse=True)
def leave_no_job(tmp_path: Path):
    """A failed test leaves the queue as it was."""
    yield
    if (tmp_path / "runs" / "s" / "jobs.json").exists():
        slurm.cancel(manifest(tmp_path))


def jobs(folder: Path) -> dict[str, str]:
    """Job by cell."""
    return json.loads((folder / "runs" / "s" / "jobs.json").read_text())


def hurry(folder: Path) -> None:
    """Start what was requeued now: SLURM would wait two minutes."""
    for job in jobs(folder).values():
        subprocess.run(
            ["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True, check=False
        )


def test_a_failed_job_stops_no_other(tmp_path: Path) -> None:
    code, out = sweep(tmp_path, *tiny(tmp_path, *HERE, "attention=mha,gqa", "optim.lr=1e-3,1e9", "--wait"))
    assert code == 1 and statuses(tmp_path) == ["done", "failed", "done", "failed"], out
    first, second, *_ = manifest(tmp_path).cells
    assert "is not finite" in read_outcome(manifest(tmp_path), second).reason
    _, alone = train(tmp_path, "optim.lr=1e-3", name="alone")
    summary = json.loads((manifest(tmp_path).run_folder(first) / "summary.json").read_text())
    assert summary["val_bpb"] == alone["val_bpb"] and steps(tmp_path, first) == [1, 2, 3, 4]
    before = jobs(tmp_path)
    code, out = sweep(tmp_path, "retry-failed", "s", "--wait")
    again = jobs(tmp_path)
    assert code == 1 and "submitted 2 cells" in out
    assert [again[cell.id] == before[cell.id] for cell in manifest(tmp_path).cells] == [
        True,
        False,
        True,
        False,
    ]


def test_a_requeued_job_goes_on_at_the_next_step(tmp_path: Path) -> None:
    """SLURM sends this signal before a time limit, and submitit takes it for a preemption too."""
    assert sweep(tmp_path, *tiny(tmp_path, *HERE, f"trainer.max_steps={LONG}"))[0] == 0
    (cell,) = manifest(tmp_path).cells
    until(lambda: len(steps(tmp_path, cell)) > 3)
    assert commands.states_now(manifest(tmp_path))[cell.id].status == "running"
    subprocess.run(["scancel", "--signal=USR2", jobs(tmp_path)[cell.id]], check=True)
    until(lambda: read_outcome(manifest(tmp_path), cell) is not None)
    assert read_outcome(manifest(tmp_path), cell).status == "stopped"
    stopped = len(steps(tmp_path, cell))
    assert 3 < stopped < LONG
    until(lambda: slurm.active(manifest(tmp_path)).get(cell.id) == "PENDING")
    assert commands.states_now(manifest(tmp_path))[cell.id].status == "queued"
    assert "0 cells" in sweep(tmp_path, "resume", "s")[1]  # it has a job
    hurry(tmp_path)
    until(lambda: read_outcome(manifest(tmp_path), cell).status == "done")
    assert statuses(tmp_path) == ["done"] and read_outcome(manifest(tmp_path), cell).attempts == 2
    assert steps(tmp_path, cell) == list(range(1, LONG + 1))


def test_a_cancelled_sweep_goes_on_when_resumed(tmp_path: Path) -> None:
    one_by_one = ("launcher.slurm.array_parallelism=1", "seed=1,2,3", f"trainer.max_steps={LONG}")
    assert sweep(tmp_path, *tiny(tmp_path, *HERE, *one_by_one))[0] == 0
    first, second, third = manifest(tmp_path).cells
    until(lambda: statuses(tmp_path)[0] == "done" and len(steps(tmp_path, second)) > 3)
    done = (manifest(tmp_path).run_folder(first) / "summary.json").stat().st_mtime_ns
    commands.cancel(manifest(tmp_path).folder)
    until(lambda: not locked(manifest(tmp_path).lock_file(second)))
    until(lambda: not slurm.active(manifest(tmp_path)))
    assert statuses(tmp_path) == ["done", "stopped", "cancelled"]
    code, out = sweep(tmp_path, "resume", "s", "--wait")
    assert code == 0 and "submitted 2 cells" in out and statuses(tmp_path) == ["done"] * 3, out
    assert (manifest(tmp_path).run_folder(first) / "summary.json").stat().st_mtime_ns == done
    for cell in (second, third):
        assert steps(tmp_path, cell) == list(range(1, LONG + 1))


def test_two_tasks_are_one_run(tmp_path: Path) -> None:
    ranks = ("launcher.devices=2", "launcher.strategy=ddp", "data.isolate=true")
    code, out = sweep(tmp_path, *tiny(tmp_path, *HERE, *ranks, "--wait"))
    assert code == 0, out
    check_two_ranks(tmp_path, "data.isolate=true")


def test_what_sbatch_refuses_leaves_no_sweep(tmp_path: Path) -> None:
    code, out = sweep(tmp_path, *tiny(tmp_path, *HERE, "launcher.slurm.partition=nowhere"))
    assert code == 2 and "launcher.slurm: sbatch refused" in out
    assert not (tmp_path / "runs" / "s").exists()
