"""What a job of SLURM is asked for: the `launcher.slurm` group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from attnzoo.train.settings import check_whole, nearest

WORDS = ("partition", "account", "qos", "constraint", "container_image", "container_workdir", "command")


@dataclass(frozen=True)
class SlurmSettings:
    """One kind of job.

    Args:
        partition, account, qos, constraint: as sbatch takes them.
        time: minutes until the run is stopped with a checkpoint and requeued.
        requeue: how often it may be requeued.
        signal_seconds: how long before the time limit the checkpoint is written.
        gpus_per_node: None for ``launcher.devices`` where ``launcher.accelerator`` is a GPU.
        mem: GB of a node.
        container_image, container_mounts, container_workdir: of enroot, by pyxis's options of srun.
        command: what starts Python in a job, in one line of shell; None for the Python that submits.
        array_parallelism: jobs of one array that run at the same time.
        setup: shell lines before the tasks start. additional: further options of sbatch by name.
    """

    partition: str | None = None
    time: int = 240
    requeue: int = 10
    signal_seconds: int = 90
    gpus_per_node: int | None = None
    cpus_per_task: int = 4
    mem: float | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    container_image: str | None = None
    container_mounts: Sequence[str] = ()
    container_workdir: str | None = None
    command: str | None = None
    array_parallelism: int = 64
    setup: Sequence[str] = ()
    additional: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("time", "signal_seconds", "cpus_per_task", "array_parallelism"):
            check_whole(f"launcher.slurm.{name}", getattr(self, name), 1)
        check_whole("launcher.slurm.requeue", self.requeue, 0)
        for name in WORDS:
            # a line break would start another line of the job's script
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (str, int)) or "\n" in str(value)):
                raise ValueError(f"launcher.slurm.{name}: must be one line of text, got {value!r}")
        for name in ("container_mounts", "setup"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(line, str) for line in value):
                raise ValueError(f"launcher.slurm.{name}: must be a list of texts, got {value!r}")
        if self.container_image is None and (self.container_mounts or self.container_workdir):
            raise ValueError("launcher.slurm.container_image: must name an image for its mounts and folder")

    def srun_arguments(self) -> list[str]:
        """Options of srun: for the container, and to end the ranks that wait for one that has died."""
        options = {
            "--container-image": self.container_image,
            "--container-mounts": ",".join(self.container_mounts),
            "--container-workdir": self.container_workdir,
        }
        return ["--kill-on-bad-exit=1", *(f"{name}={value}" for name, value in options.items() if value)]


def read_slurm(launcher: Mapping[str, Any]) -> SlurmSettings:
    """The settings of a `launcher` group, checked.

    Raises:
        ValueError: an unknown key, or a value against its rule.
    """
    legal = [f.name for f in fields(SlurmSettings)]
    for key in launcher["slurm"]:
        if key not in legal:
            raise ValueError(f"launcher.slurm.{key}: no such key; {nearest(str(key), legal)}")
    devices = launcher["devices"]
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        raise ValueError(f"launcher.devices: must be the number of processes of a node, got {devices!r}")
    check_whole("launcher.num_nodes", launcher["num_nodes"], 1)
    return SlurmSettings(**launcher["slurm"])
