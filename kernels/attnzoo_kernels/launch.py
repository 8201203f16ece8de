"""Which implementation of an op runs, and how its Triton kernels are declared and their tiles chosen.

triton is imported by the kernel modules alone, and those by the ops on their first use: importing an op needs
torch only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")
NVIDIA = CHIPS[:3]
IMPLS = ("auto", "reference", "triton")
MOST_PROGRAMS = 65535  # along the second and third axis of a grid


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors; read when a kernel module is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose(op: str, impl: str, *tensors: Tensor | None, refusal: str | None = None) -> str:
    """ "reference" or "triton" for these operands.

    auto: the kernels for fp32, bf16 and fp16 on a GPU with triton, the reference elsewhere.

    Args:
        refusal: why the op's own kernels cannot take these operands, with the way out; None = they can.

    Raises:
        ValueError: ``impl`` is unknown, or "triton" was asked for and cannot run; the message says why.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: needs one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "reference":
        return impl
    given = [x for x in tensors if x is not None]
    why = refusal
    if not has_triton():
        why = "triton is not installed; install attnzoo[triton]"
    elif any(x.dtype == torch.float64 for x in given):
        why = "the kernels work in fp32 and below, got float64; use the reference"
    elif not interpreting() and not all(x.is_cuda for x in given):
        why = f"the kernels need a GPU, got tensors on {given[0].device}; TRITON_INTERPRET=1 tries them here"
    if why is None:
        return "triton" if impl == "triton" or given[0].is_cuda else "reference"
    if impl == "triton":
        raise ValueError(f"impl: 'triton' cannot run {op}: {why}")
    return "reference"


def precision() -> str:
    """How fp32 operands are multiplied on tensor cores: exactly, unless torch was told that TF32 will do."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n`` and ``least``."""
    return max(least, 1 << (n - 1).bit_length())


@dataclass(frozen=True)
class Tile:
    """A configuration of a kernel: block sizes, warps and stages, and the chips where its table is clean."""

    meta: Mapping[str, int]
    warps: int = 4
    stages: int = 2
    chips: tuple[str, ...] = CHIPS

    @property
    def name(self) -> str:
        sizes = "-".join(f"{key.lower().removeprefix('block_')}{value}" for key, value in self.meta.items())
        return f"{sizes}-w{self.warps}-s{self.stages}"


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel as the resource table and the tuner know it.

    Args:
        name: ``<op>_<what>``.
        fn: the jitted function.
        tiles: what may be tried, the best guess first (that is what runs without tuning).
        cases: name -> the constexprs, beside the tile's, of one specialisation in the table.
        types: name -> type of every argument that is not a constexpr, as Triton spells it: "*bf16", "*fp32",
            "i32", "fp32" ...; a callable makes it from the case's constexprs.
    """

    name: str
    fn: Any
    tiles: tuple[Tile, ...]
    cases: Mapping[str, Mapping[str, Any]]
    types: Mapping[str, str] | Callable[[Mapping[str, Any]], Mapping[str, str]]

    def start(self, tile: Tile, grid: tuple[int, ...], values: Mapping[str, Any]) -> None:
        """Launches with what ``values`` holds by the arguments' names; it may hold more."""
        named = {name: values[name] for name in self.fn.arg_names}
        self.fn[grid](**named, num_warps=tile.warps, num_stages=tile.stages)

    def signature(self, case: str) -> Mapping[str, str]:
        return self.types(self.cases[case]) if callable(self.types) else self.types


@lru_cache
def chip(device: torch.device) -> str:
    """The column of the resource table that speaks for this device."""
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


@dataclass
class Tuner:
    """Remembers the fastest tile per (GPU, triton version, kernel, shape bucket), on disk.

    ``deterministic`` (also torch.use_deterministic_algorithms, and ATTNZOO_TUNE=0) takes the first tile.
    """

    deterministic: bool = field(default_factory=lambda: os.environ.get("ATTNZOO_TUNE", "1") == "0")
    memory: dict[str, str] | None = None
    file: Path | None = None

    def pick(
        self, kernel: Kernel, bucket: Hashable, device: torch.device, run: Callable[[Tile], Any]
    ) -> Tile:
        """The tile to launch ``kernel`` with; ``run(tile)`` launches it, repeatably, where it is timed."""
        if device.type != "cuda":
            return kernel.tiles[0]
        tiles = [tile for tile in kernel.tiles if chip(device) in tile.chips]
        if not tiles:
            raise RuntimeError(f"{kernel.name}: no configuration fits {chip(device)}; use impl='reference'")
        capturing = torch.cuda.is_current_stream_capturing()
        if len(tiles) == 1 or self.deterministic or capturing or torch.are_deterministic_algorithms_enabled():
            return tiles[0]
        self._load(device)
        key = f"{kernel.name} {bucket}"
        names = {tile.name: tile for tile in tiles}
        if self.memory.get(key) not in names:
            self.memory[key] = self._fastest(tiles, run).name
            self._save()
        return names[self.memory[key]]

    @staticmethod
    def _fastest(tiles: list[Tile], run: Callable[[Tile], Any]) -> Tile:
        from triton.runtime.errors import OutOfResources
        from triton.testing import do_bench

        times = {}
        for i, tile in enumerate(tiles):
            try:
                times[i] = do_bench(lambda tile=tile: run(tile), warmup=5, rep=20)
            except OutOfResources:  # a smaller chip of the same generation
                continue
        if not times:
            raise RuntimeError("no tile of the list fits this device; use impl='reference'")
        return tiles[min(times, key=times.get)]

    def _load(self, device: torch.device) -> None:
        if self.memory is not None:
            return
        import triton

        home = Path(os.environ.get("ATTNZOO_CACHE", Path.home() / ".cache" / "attnzoo"))
        gpu = torch.cuda.get_device_name(device).replace(" ", "-")
        self.file = home / "tiles" / f"{gpu}-triton{triton.__version__}.json"
        try:
            self.memory = json.loads(self.file.read_text())
        except (OSError, ValueError):  # none yet, or a write that was cut off
            self.memory = {}

    def _save(self) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.file.parent, delete=False) as out:
                json.dump(self.memory, out, indent=1, sort_keys=True)
            os.replace(out.name, self.file)
        except OSError:  # a read-only home costs a search per process, nothing else
            return


tuner = Tuner()


def bucket(length: int) -> int:
    """Lengths share their tuning by powers of two, from 512 to 65536."""
    return min(max(512, power_of_2(length)), 65536)


_checked: set[tuple[str, torch.device]] = set()


def self_check(op: str, device: torch.device, worst: Callable[[torch.device], tuple[float, float]]) -> None:
    """Runs an op's small self-check on a device once per process, before its first result is used.

    Args:
        worst: makes operands on the device and returns the kernels' largest error against the reference, and
            the largest that rounding explains.

    Raises:
        RuntimeError: the kernels are wrong on this device; the message names the way out.
    """
    if device.type != "cuda" or (op, device) in _checked:
        return
    _checked.add((op, device))
    error, bound = worst(device)
    if not error <= bound:
        _checked.discard((op, device))
        raise RuntimeError(
            f"{op}: the Triton kernels are off by {error:.2e} on {torch.cuda.get_device_name(device)}, where "
            f"rounding explains {bound:.2e}; use impl='reference' and report the device and triton's version"
        )
