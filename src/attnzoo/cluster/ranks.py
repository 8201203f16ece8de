"""One run in several processes that torchrun or srun has started: who they are, and what they agree on.

All of them follow rank 0: its command line, its run folder, its exit. What the ranks tell each other goes
through the store at MASTER_ADDR:MASTER_PORT, which they need for training anyway.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

TORCHRUN = "TORCHELASTIC_RUN_ID"  # there if torchrun, or something like it, has started this process
START = timedelta(minutes=30)  # that the ranks wait for rank 0 to begin: one of them may be late
END = timedelta(seconds=60)  # that the ranks wait for rank 0 to end, or to say what is wrong
LINGER = timedelta(seconds=5)  # that rank 0 stays for the others to hear it
PORTS = range(10000, 30000)  # below those that the system deals out by itself


@dataclass(frozen=True)
class Place:
    """One process among those of a run.

    Args:
        rank: of ``world`` processes in all. local_world: processes of a node.
    """

    rank: int
    world: int
    local_world: int


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Which rank this process is, None if nobody has started it as one.

    Raises:
        ValueError: the environment says only a part of it, or what cannot be.
    """
    if TORCHRUN not in environment:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    found = [environment.get(name, "") for name in names]
    if not all(value.isdecimal() for value in found):
        said = ", ".join(f"{name}={value or 'nothing'}" for name, value in zip(names, found, strict=True))
        raise ValueError(f"torchrun: must set {', '.join(names)} to numbers, got {said}; start it again")
    rank, world, local = map(int, found)
    if not rank < world or not local or world % local:
        raise ValueError(
            f"torchrun: every node must start as many processes, got rank {rank} of {world} with {local} on "
            "this node; give all nodes the same --nproc-per-node"
        )
    return Place(rank, world, local)


def join(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make a task of srun a rank, as torchrun would; elsewhere in a job Lightning starts the ranks itself.

    Lightning would otherwise take any process in a job for one of its tasks, and wait for the rest.
    """
    if TORCHRUN in environment:
        return
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        environment.update(from_slurm(environment))
    else:
        environment.pop("SLURM_NTASKS", None)


def from_slurm(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that torchrun sets, for a task of srun."""
    job, step = environment["SLURM_JOB_ID"], environment.get("SLURM_STEP_ID", "0")
    restarts = environment.get("SLURM_RESTART_COUNT", "0")
    world = int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_JOB_NUM_NODES", "1"))
    names = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    return {
        "MASTER_ADDR": first_host(names),
        "MASTER_PORT": str(PORTS[(31 * int(job) + int(step)) % len(PORTS)]),
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(world // nodes),
        "GROUP_RANK": environment.get("SLURM_NODEID", "0"),
        TORCHRUN: f"{job}-{step}-{restarts}",
    }


def first_host(names: str) -> str:
    """The first of SLURM's list of nodes: gpu[03-05,9],login2 -> gpu03."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^\[,]*))?", names)
    if not found:
        raise ValueError(f"SLURM_JOB_NODELIST: must be a list of nodes, got {names!r}; start inside a job")
    return "".join(part or "" for part in found.groups())


def launcher_here(launcher: Mapping[str, Any]) -> dict[str, Any]:
    """The `launcher` group as it holds in this process.

    Whoever started the ranks decides how many there are; keys that only matter outside a job are left out.

    Raises:
        ValueError: the configuration asks for another number of them.
    """
    kept = {key: value for key, value in launcher.items() if key != "slurm"}
    found = place()
    if found is None:
        return kept
    given = {"devices": found.local_world, "num_nodes": found.world // found.local_world}
    for key, count in given.items():
        if str(kept[key]) not in (str(count), "1", "auto", "-1"):
            unit = "processes on this node" if key == "devices" else "nodes"
            raise ValueError(
                f"launcher.{key}: torchrun or srun has started {count} {unit}, got {kept[key]}; "
                "leave it out, it is taken from there"
            )
    return kept | given


class Team:
    """The ranks of one run, seen from one of them; a process that is alone says everything itself."""

    def __init__(self, place: Place | None) -> None:
        self.rank, self.world = (place.rank, place.world) if place else (0, 1)
        if self.world > 1:
            import torch.distributed as dist

            # the one that training uses later, too: whoever serves it goes on to serve it
            self._store = next(dist.rendezvous("env://", timeout=START))[0]

    def begin(self, arguments: list[str], folder: str) -> None:
        """Tell the others, as rank 0, what they have to run and where."""
        if not self.rank:
            self._tell("begin", {"arguments": [*arguments, f"hydra.run.dir={quoted(folder)}"]})

    def follow(self, arguments: list[str]) -> list[str] | None:
        """The command line of this rank, which is rank 0's; None if rank 0 has ended before it began."""
        if not self.rank:
            return arguments
        told = self._told("begin", START)
        return told.get("arguments") if told else None

    def end(self, code: int, text: str = "") -> int:
        """Report an error once, and return the exit code when rank 0 has ended.

        Launchers end the ranks that are left as soon as one has failed, so the others let rank 0 go first.
        An error that all ranks have is rank 0's to report.
        """
        if not self.rank:
            _report(text)
            for key in ("end", "begin"):
                self._tell(key, {"code": code, "text": text})
            if code and self.world > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                self._linger()
            return code
        first = self._told("end", END) if code else None
        self._tell(f"heard/{self.rank}", {})
        if text and (first is None or first["text"] != text):
            _report(f"rank {self.rank}: {text}")
        return code if text or first is None else first["code"]

    def _linger(self) -> None:
        """This process serves the store: stay until the others have heard."""
        with suppress(RuntimeError):
            self._store.wait([f"attnzoo/heard/{rank}" for rank in range(1, self.world)], LINGER)

    def _tell(self, key: str, content: Mapping[str, Any]) -> None:
        if self.world > 1:
            with suppress(RuntimeError):  # nobody is left to hear it
                self._store.set(f"attnzoo/{key}", json.dumps(content))

    def _told(self, key: str, patience: timedelta) -> dict[str, Any] | None:
        """What rank 0 told, None if it has gone without a word."""
        try:
            self._store.wait([f"attnzoo/{key}"], patience)
            return json.loads(self._store.get(f"attnzoo/{key}"))
        except (RuntimeError, ValueError):
            return None


def quoted(folder: str) -> str:
    """A path for Hydra's command line."""
    escaped = folder.replace("'", "\\'")
    return f"'{escaped}'"


def _report(text: str) -> None:
    if text:
        print(f"error: {text}", file=sys.stderr, flush=True)
