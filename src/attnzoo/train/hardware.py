"""What the machine offers: precision, peak arithmetic, memory."""

from __future__ import annotations

import platform
import sys

import torch

# dense bf16 FLOPs per second by vendors' data sheets; the first name contained in the device's name counts
PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
}

# below this width the casts cost a CPU more than its bf16 matrix products save (measured at 64 and at 128)
CPU_BF16_DIM = 128


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOPs per second, or None where it is not known; a CPU has no single figure."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_BF16.items() if known in name), None)


def peak_memory(device: torch.device) -> int | None:
    """Largest memory so far in bytes: the allocator's on a GPU, the process's own on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def choose_precision(request: str, device: torch.device, dim: int = CPU_BF16_DIM) -> tuple[str, str]:
    """Lightning's name of the precision, and why.

    Args:
        request: "bf16", "fp32", or "auto": bf16 where the device multiplies bf16 matrices natively. A CPU
            needs AMX or AVX512-BF16 for that (with neither, bf16 is emulated and slower than fp32), and a
            model of at least `CPU_BF16_DIM`.
        dim: width of the model.
    """
    if request == "fp32":
        return "32-true", "requested"
    if request == "bf16":
        return "bf16-mixed", "requested"
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None
        return ("bf16-mixed", "native bf16") if native else ("32-true", "no native bf16 on this GPU")
    if device.type == "cpu":
        if dim < CPU_BF16_DIM:
            return "32-true", f"dim {dim} is too narrow for bf16 on a CPU"
        found = [flag for flag in ("amx_bf16", "avx512_bf16") if cpu_has(flag)]
        return ("bf16-mixed", found[0]) if found else ("32-true", "no AMX or AVX512-BF16 on this CPU")
    return "32-true", f"bf16 is untested on {device.type}"


def cpu_has(flag: str) -> bool:
    """Whether torch finds an instruction set on this CPU; False where this torch cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return bool(capabilities().get(flag, False))
    probe = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}[flag]
    return bool(getattr(torch.cpu, probe, lambda: False)())
