"""Sweeps and runs on a real SLURM: `scripts/local_slurm.sh` starts one; without one they are skipped."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnzoo.cluster import jobs as cluster
from attnzoo.sweep import commands, slurm
from attnzoo.sweep.state import locked, read_outcome
from attnzoo.train.checkpoint import read_checkpoint
from runs import metrics_so_far, overrides, train
from sweeps import PATIENCE, check_two_ranks, manifest, statuses, steps, sweep, tiny, until

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


def hurry(*waiting: str) -> None:
    """Start what was requeued, as soon as its earlier attempt is gone: SLURM would wait two minutes.

    A node refuses to start a job of which it still has a step, or that it has ended in the same second, and
    SLURM then calls the job failed.
    """
    for job in waiting:
        until(lambda job=job: re.search(r"\bJobId=(\d+)", about(job))[1] not in jobs_here())
        subprocess.run(
            ["scontrol", "update", f"JobId={job}", "StartTime=now+2"], capture_output=True, check=False
        )


def jobs_here() -> list[str]:
    """The jobs of which this node has a step."""
    listed = subprocess.run(["scontrol", "listpids"], capture_output=True, text=True, check=False).stdout
    return [line.split()[1] for line in listed.splitlines()[1:]]


def about(job: str) -> str:
    """What SLURM still knows of a job."""
    return subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout


def ended(job: str) -> bool:
    """Whether a job has ended for good: one that comes back is for a moment neither queued nor running."""
    return re.search("JobState=(COMPLETED|FAILED|CANCELLED) ", about(job)) is not None


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def shell(folder: Path, *arguments: str) -> tuple[int, str]:
    """`attnzoo` in ``folder``: its exit code, and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "attnzoo.cli", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    return done.returncode, done.stdout


def srun(folder: Path, tasks: int, *command: str) -> subprocess.CompletedProcess:
    """Run the tasks of a job and wait for them."""
    return subprocess.run(
        ["srun", f"--ntasks={tasks}", "--cpus-per-task=1", *command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def assert_same(one: Any, other: Any) -> None:
    """Equal to the last bit, however nested."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        torch.testing.assert_close(one, other, rtol=0, atol=0)


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
    hurry(*jobs(tmp_path).values())
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


def test_a_run_as_a_job_goes_on_bitwise_after_a_signal(tmp_path: Path) -> None:
    """SIGUSR1 stops it with a checkpoint, the job requeues itself once, and nothing shows it afterwards."""
    folder, options = tmp_path / "run", (f"trainer.max_steps={LONG}", "optim.name=muon")
    more = (*HERE, *options, "data.num_workers=1", f"hydra.run.dir={folder}")  # a worker hears the signal too
    code, out = shell(tmp_path, "train", *overrides(tmp_path, *more))
    assert code == 0 and "tail -F run/slurm/" in out, out
    job = re.match(r"job (\d+): run folder run\n", out)[1]
    try:
        until(lambda: len(metrics_so_far(folder)) > 3)
        subprocess.run(["scancel", "--signal=USR1", job], check=True)
        until(lambda: cluster.queued([job]).get(job) == "PENDING")
        stopped = json.loads((folder / "summary.json").read_text())
        assert stopped["status"] == "stopped" and stopped["stopped_by"] == "SIGUSR1"
        assert 3 < stopped["steps"] < LONG
        hurry(job)
        until(lambda: ended(job))
    finally:
        subprocess.run(["scancel", job], check=False, capture_output=True)
    assert "Restarts=1" in about(job) and "ExitCode=0:0" in about(job)
    assert [line["step"] for line in metrics_so_far(folder)] == list(range(1, LONG + 1))
    train(tmp_path, *options, name="alone")
    alone = metrics_so_far(tmp_path / "alone")
    for key in ("train_loss", "grad_norm"):
        assert [line[key] for line in metrics_so_far(folder)] == [line[key] for line in alone]
    once, twice = (read_checkpoint(path) for path in (tmp_path / "alone", folder))
    assert_same(once["model"], twice["model"])
    assert_same(once["optimizer"], twice["optimizer"])


def endless(folder: Path, *options: str) -> tuple[Path, str]:
    """A job whose run takes longer than any test: its run folder, and its number."""
    run = folder / "run"
    more = (*HERE, "trainer.max_steps=1000000", f"hydra.run.dir={run}", *options)
    code, out = shell(folder, "train", *overrides(folder, *more))
    assert code == 0, out
    until(lambda: len(metrics_so_far(run)) > 3)
    return run, re.match(r"job (\d+): ", out)[1]


def test_a_time_limit_stops_a_run_that_then_goes_on(tmp_path: Path) -> None:
    """SLURM's own signal before its own time limit; it knows minutes, and signals up to half of one early."""
    folder, job = endless(tmp_path, "launcher.slurm.time=2", "launcher.slurm.signal_seconds=30")
    check_goes_on(folder, job, "SIGUSR1")


def test_a_preempted_run_goes_on(tmp_path: Path) -> None:
    """SLURM takes the job off its node, with SIGTERM, and puts it back into the queue itself."""
    folder, job = endless(tmp_path)
    subprocess.run(["scontrol", "requeue", job], check=True)
    check_goes_on(folder, job, "SIGTERM")


def check_goes_on(folder: Path, job: str, by: str) -> None:
    """The job comes back and goes on with the step after its checkpoint's."""
    try:
        until(lambda: cluster.queued([job]).get(job) == "PENDING")
        until(lambda: job not in jobs_here())
        stopped = json.loads((folder / "summary.json").read_text())
        assert stopped["status"] == "stopped" and stopped["stopped_by"] == by
        assert stopped["steps"] == metrics_so_far(folder)[-1]["step"] > 3
        subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=30"], check=True)
        hurry(job)
        until(lambda: len(metrics_so_far(folder)) > stopped["steps"] + 3)
    finally:
        subprocess.run(["scancel", job], check=False, capture_output=True)
    until(lambda: ended(job) and job not in jobs_here())
    assert "Restarts=1" in about(job)
    assert [line["step"] for line in metrics_so_far(folder)] == list(
        range(1, len(metrics_so_far(folder)) + 1)
    )


def test_a_job_that_fails_has_the_code_of_its_run(tmp_path: Path) -> None:
    options = (*HERE, "optim.lr=1e9", f"hydra.run.dir={tmp_path / 'run'}", "--wait")
    code, out = shell(tmp_path, "train", *overrides(tmp_path, *options))
    assert code == 1 and out.count("is not finite") == 1, out
    assert "ExitCode=1:0" in about(re.match(r"job (\d+)", out)[1])


def test_tasks_of_srun_are_ranks(tmp_path: Path) -> None:
    """Plain srun, without submitit: two tasks, one run, and its exit code."""
    command = [sys.executable, "-m", "attnzoo.cli", "train"]
    options = overrides(tmp_path, "data.isolate=true", "launcher.accelerator=cpu")
    run = (*options, f"hydra.run.dir={tmp_path / 'run'}")
    done = srun(tmp_path, 2, *command, *run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: ") == 1
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"] == 2
    done = srun(tmp_path, 2, *command, *options, "launcher.devices=3")
    assert done.returncode == 2
    assert done.stderr.count("launcher.devices: torchrun or srun has started 2 processes") == 1, done.stderr


def test_a_plain_script_requeues_itself(tmp_path: Path) -> None:
    """scripts/cluster/train.sbatch: a time limit's signal, a requeue, and the run's end."""
    script = Path(__file__).parents[1] / "scripts" / "cluster" / "train.sbatch"
    folder = tmp_path / "run"
    options = overrides(tmp_path, f"trainer.max_steps={LONG}", "launcher.accelerator=cpu")
    resources = ("--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=30")
    asked = subprocess.run(
        ["sbatch", "--parsable", *resources, f"--output={tmp_path / 'log'}", str(script), *options],
        cwd=tmp_path,
        env=environment() | {"RUN": str(folder), "ATTNZOO": f"{sys.executable} -m attnzoo.cli"},
        capture_output=True,
        text=True,
        check=True,
    )
    job = asked.stdout.strip()
    try:
        until(lambda: len(metrics_so_far(folder)) > 3)
        subprocess.run(["scancel", "--signal=USR1", job], check=True)
        until(lambda: cluster.queued([job]).get(job) == "PENDING")
        hurry(job)
        until(lambda: ended(job))
    finally:
        subprocess.run(["scancel", job], check=False, capture_output=True)
    assert "Restarts=1" in about(job), about(job)
    assert "ExitCode=0:0" in about(job), (tmp_path / "log").read_text()
    assert [line["step"] for line in metrics_so_far(folder)] == list(range(1, LONG + 1))


def test_two_tasks_are_one_run(tmp_path: Path) -> None:
    ranks = ("launcher.devices=2", "launcher.strategy=ddp", "data.isolate=true")
    code, out = sweep(tmp_path, *tiny(tmp_path, *HERE, *ranks, "--wait"))
    assert code == 0, out
    check_two_ranks(tmp_path, "data.isolate=true")


def test_what_sbatch_refuses_leaves_no_sweep(tmp_path: Path) -> None:
    code, out = sweep(tmp_path, *tiny(tmp_path, *HERE, "launcher.slurm.partition=nowhere"))
    assert code == 2 and "launcher.slurm: sbatch refused" in out
    assert not (tmp_path / "runs" / "s").exists()
