"""Machines that a plan is made for: figures that are inputs, read from `configs/hardware`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from attnzoo.train.hardware import PEAK_BF16
from attnzoo.train.settings import check_number, check_whole, nearest

GIB = 2**30
FLOPS, BYTES, RATE = "FLOPs per second, such as 1e15", "bytes, such as 8e10", "bytes per second, such as 5e10"
SECONDS = "seconds, such as 5e-6"
# lowest and highest value of a field, and how it is given
RULES = {
    "peak_flops": (1, math.inf, FLOPS),
    "fp32_flops": (1, math.inf, FLOPS),
    "memory": (1, math.inf, BYTES),
    "memory_bandwidth": (1, math.inf, RATE),
    "link": (1, math.inf, RATE),
    "network": (1, math.inf, RATE),
    "link_latency": (0, math.inf, SECONDS),
    "network_latency": (0, math.inf, SECONDS),
    "launch": (0, math.inf, SECONDS),
    "efficiency": (1e-3, 1, "a share, such as 0.6"),
    "bandwidth_efficiency": (1e-3, 1, "a share, such as 0.8"),
    "reserve": (0, 0.9, "a share, such as 0.08"),
}


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal devices; bytes, seconds, and bytes or FLOPs per second of one device.

    Args:
        name: for the reader. source: where the figures are from.
        peak_flops: on bf16 products, dense. fp32_flops: on fp32 products.
        memory: of a device. memory_bandwidth: of it.
        per_node: devices that the fast links connect. link: what a device sends to the others of its node.
        network: what a device sends to other nodes, all devices of the node sending.
        link_latency, network_latency: of one message.
        launch: a device's host needs this long to start an operation.
        asynchronous: whether the host runs ahead of the device; else both times add up.
        efficiency: share of the peak that products reach. bandwidth_efficiency: the same of memory, links
            and network. Assumptions, not measured: measure yours.
        reserve: share of the memory that is left to the driver, libraries and fragmentation.
    """

    name: str
    source: str
    peak_flops: float
    fp32_flops: float
    memory: float
    memory_bandwidth: float
    per_node: int
    link: float
    network: float
    link_latency: float
    network_latency: float
    launch: float
    asynchronous: bool = True
    efficiency: float = 0.6
    bandwidth_efficiency: float = 0.8
    reserve: float = 0.08

    def __post_init__(self) -> None:
        check_whole("hardware.per_node", self.per_node, 1)
        for field, (low, high, unit) in RULES.items():
            try:
                check_number(f"hardware.{field}", getattr(self, field), low, high)
            except ValueError as error:
                raise ValueError(f"{error}; give {unit}") from None
        if not isinstance(self.asynchronous, bool):
            raise ValueError(f"hardware.asynchronous: must be true or false, got {self.asynchronous!r}")
        if not isinstance(self.source, str):
            raise ValueError(f"hardware.source: must be text, got {self.source!r}; put it in quotes")

    @property
    def usable(self) -> float:
        """Bytes that a run may take."""
        return self.memory * (1 - self.reserve)


def read_hardware(folder: Path, name: str, changes: Mapping[str, Any] | None = None) -> Hardware:
    """The entry ``name`` of a folder of YAML files, with some fields changed.

    Raises:
        ValueError: no such entry or field, or a value against its rule.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"hardware: no entry {name!r}; {nearest(str(name), known)}")
    values = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"))
    legal = [f.name for f in fields(Hardware) if f.name != "name"]
    for key, value in (changes or {}).items():
        if key == "name":
            raise ValueError(f"hardware.name: is the entry's, got {value!r}; choose one with hardware={name}")
        if key not in legal:
            raise ValueError(f"hardware.{key}: no such key; {nearest(key, legal)}")
        values[key] = value
    if isinstance(values["peak_flops"], str):  # a name in the table that MFU is counted by
        values["peak_flops"] = _peak(values["peak_flops"])
    return Hardware(name=name, **values)


def _peak(device: str) -> float:
    if device not in PEAK_BF16:
        raise ValueError(
            f"hardware.peak_flops: must be a number of at least 1 or a device's name, got {device!r}; "
            f"{nearest(device, PEAK_BF16)}"
        )
    return PEAK_BF16[device]


def entry_for(folder: Path, device: str) -> str | None:
    """The entry whose device's name is contained in ``device``, the longest one; None = not known."""
    found = {}
    for path in folder.glob("*.yaml"):
        peak = OmegaConf.load(path).peak_flops
        if isinstance(peak, str) and peak in device:
            found[peak] = path.stem
    return found[max(found, key=len)] if found else None
