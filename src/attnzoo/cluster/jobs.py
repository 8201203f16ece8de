"""Jobs of SLURM through submitit: what a sweep's cells and a single run have in common.

A task that was stopped before its end leaves with `AGAIN`, and the job's script then puts the job back into
the queue. The script does it because it runs on the node itself: inside a container there may be no scontrol.
submitit keeps its scripts, pickles and logs in one folder, which only its owner may read.
"""

from __future__ import annotations

import getpass
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnzoo.cluster.settings import read_slurm

AGAIN = 75  # the exit code for "try again later" of BSD's sysexits.h
REQUEUE = """\
code=$?
if [ "$code" -eq {again} ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {times} ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
  else
    echo "stopped once more, and launcher.slurm.requeue={times}: submit it again to go on"
  fi
fi
exit "$code\""""


def check_launcher(launcher: Mapping[str, Any]) -> None:
    """Raise a ValueError unless jobs of this `launcher` group can be submitted from here."""
    read_slurm(launcher)
    if shutil.which("sbatch") is None:
        raise ValueError("launcher: slurm needs sbatch, which is not here; start from a login node")


def submit(folder: Path, name: str, launcher: Mapping[str, Any], tasks: Sequence[Any]) -> list[str]:
    """Submit tasks, as one array where there are several; returns the job of each.

    Args:
        folder: of submitit's files.
        name: of the job in the queue.

    Raises:
        ValueError: sbatch refuses; the message holds what it said.
    """
    from submitit.core.utils import FailedJobError

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    try:
        jobs = _executor(folder, name, launcher).submit_array(list(tasks))
    except FailedJobError as error:
        said = str(error).strip().splitlines()[-1]
        raise ValueError(f"launcher.slurm: sbatch refused the job, {said}") from error
    return [job.job_id for job in jobs]


def queued(jobs: Iterable[str]) -> dict[str, str]:
    """SLURM's word for the state of those jobs that it still has: not every cluster keeps accounts."""
    jobs = set(jobs)
    if not jobs:
        return {}
    queue = ["squeue", "-h", "-r", "-o", "%i %T", "-u", getpass.getuser()]
    listed = subprocess.run(queue, capture_output=True, text=True, check=True).stdout
    pairs = (line.split() for line in listed.splitlines())
    return {job: status for job, status in pairs if job in jobs and status != "COMPLETED"}


def cancel(jobs: Sequence[str]) -> None:
    """Take jobs from the queue; those that run stop with a checkpoint."""
    if jobs:
        subprocess.run(["scancel", *jobs], check=True)


def _executor(folder: Path, name: str, launcher: Mapping[str, Any]) -> Any:
    from submitit import SlurmExecutor

    slurm, devices = read_slurm(launcher), launcher["devices"]
    gpus = slurm.gpus_per_node
    if gpus is None and launcher["accelerator"] in ("gpu", "cuda"):
        gpus = devices
    settings = {
        "job_name": name,
        "partition": slurm.partition,
        "time": slurm.time,
        "nodes": launcher["num_nodes"],
        "ntasks_per_node": devices,
        "gpus_per_node": gpus,
        "cpus_per_task": slurm.cpus_per_task,
        "mem": f"{slurm.mem}G" if slurm.mem else None,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "array_parallelism": slurm.array_parallelism,
        "setup": list(slurm.setup),
        "teardown": REQUEUE.format(again=AGAIN, times=slurm.requeue).splitlines(),
        "signal_delay_s": slurm.signal_seconds,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **slurm.additional},
        "srun_args": slurm.srun_arguments(),
    }
    executor = SlurmExecutor(folder, python=slurm.command)
    executor.update_parameters(**{key: value for key, value in settings.items() if value is not None})
    return executor
