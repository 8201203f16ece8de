"""Compiles kernels ahead of time, without a GPU, and reads what they use from the binary."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource

import attnzoo_kernels
from attnzoo_kernels.launch import Kernel, Tile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one block may use, in bytes.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TENSOR_CORES = {
    "sm_80": r"\bmma\.sync",
    "sm_90": r"\bwgmma\.mma_async",
    "sm_100": r"\btcgen05\.mma",
    "gfx942": r"v_mfma_",
}


class Resources(NamedTuple):
    """What one compiled kernel uses: a row of the resource table.

    Units: registers per thread, stack and spill bytes per thread, shared bytes per block; ``tensor`` counts
    the chip's own tensor-core instructions, ``mma`` those of the older kind that run there too.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    tensor: int
    mma: int


def kernels() -> dict[str, Kernel]:
    """Every declared kernel: the `KERNELS` of the modules of the ops' folders, by name."""
    found: dict[str, Kernel] = {}
    for module in pkgutil.walk_packages(attnzoo_kernels.__path__, "attnzoo_kernels."):
        if module.name.rpartition(".")[2].startswith("kernel"):
            for kernel in importlib.import_module(module.name).KERNELS:
                assert kernel.name not in found, f"two kernels are called {kernel.name}"
                found[kernel.name] = kernel
    return dict(sorted(found.items()))


def compile_kernel(kernel: Kernel, case: str, tile: Tile, chip: str) -> Resources:
    """Compiles one specialisation; pointers and 64-bit strides count as aligned to 16 bytes."""
    constants = {**kernel.cases[case], **tile.meta}
    types = kernel.signature(case)
    names = kernel.fn.arg_names
    missing = [name for name in names if name not in types and name not in constants]
    assert not missing, f"{kernel.name} {case}: no type or value for {missing}"
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = BaseBackend.parse_attr("D")
    attrs = {
        (i,): aligned
        for i, name in enumerate(names)
        if signature[name].startswith("*") or signature[name] == "i64"
    }
    source = ASTSource(kernel.fn, signature, constants, attrs)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return _read(triton.compile(source, target=TARGETS[chip], options=options), chip)


def _read(compiled, chip: str) -> Resources:
    if chip == "gfx942":
        text = compiled.asm["amdgcn"]
        number = lambda key: max([int(x) for x in re.findall(rf"\.{key}:\s+(\d+)", text)], default=0)  # noqa: E731
        return Resources(
            registers=number("vgpr_count"),
            stack=number("private_segment_fixed_size"),
            spills=4 * number("vgpr_spill_count"),
            shared=compiled.metadata.shared,
            tensor=len(re.findall(TENSOR_CORES[chip], text)),
            mma=0,
        )
    ptx, usage = compiled.asm["ptx"], _usage(compiled.asm["cubin"])
    return Resources(
        registers=usage["REG"],
        stack=usage["STACK"],
        spills=usage["LOCAL"],
        shared=compiled.metadata.shared,
        tensor=len(re.findall(TENSOR_CORES[chip], ptx)),
        mma=0 if chip == "sm_80" else len(re.findall(TENSOR_CORES["sm_80"], ptx)),
    )


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", out)}


def versions() -> dict[str, str]:
    """Of triton and of the ptxas in it."""
    out = subprocess.run([_tool("ptxas"), "--version"], check=True, capture_output=True, text=True).stdout
    return {"triton": triton.__version__, "ptxas": re.search(r"V(\d+\.\d+\.\d+)", out).group(1)}
