"""The gated norm, whole rows in registers, a few to a program."""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.launch import Kernel, Tile


@triton.jit
def _starts(row, H, T, z_b, z_h, z_t):
    """Offsets of rows, counted in 32 bits and addressed in 64."""
    outer = row // T
    b, h, t = (outer // H).to(tl.int64), (outer % H).to(tl.int64), (row % T).to(tl.int64)
    return (b * z_b + h * z_h + t * z_t)[:, None]


@triton.jit
def forward(
    o, gain, gate, y, rows, H, T, d, eps,
    o_b, o_h, o_t, gate_b, gate_h, gate_t, y_b, y_h, y_t,
    HAS_GATE: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK // BLOCK_D
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < rows)[:, None] & (c < d)
    x = tl.load(o + _starts(row, H, T, o_b, o_h, o_t) + c, mask=mask, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / d + eps)
    out = x * rstd[:, None] * tl.load(gain + c, mask=c < d, other=0.0).to(tl.float32)
    if HAS_GATE:
        z = tl.load(gate + _starts(row, H, T, gate_b, gate_h, gate_t) + c, mask=mask, other=0.0)
        z = z.to(tl.float32)
        out *= (z if SILU else 1.0) / (1.0 + tl.exp(-z))
    tl.store(y + _starts(row, H, T, y_b, y_h, y_t) + c, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward(
    g, o, gain, gate, do, dgate, parts, rows, H, T, d, eps, steps,
    g_b, g_h, g_t, o_b, o_h, o_t, gate_b, gate_h, gate_t, do_b, do_h, do_t, dgate_b, dgate_h, dgate_t,
    HAS_GATE: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``steps`` blocks of rows, whose part of the gain's gradient stays in registers."""
    ROWS: tl.constexpr = BLOCK // BLOCK_D
    c = tl.arange(0, BLOCK_D)[None, :]
    scale = tl.load(gain + c, mask=c < d, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (c < d)
        x = tl.load(o + _starts(row, H, T, o_b, o_h, o_t) + c, mask=mask, other=0.0).to(tl.float32)
        by_norm = tl.load(g + _starts(row, H, T, g_b, g_h, g_t) + c, mask=mask, other=0.0).to(tl.float32)
        if HAS_GATE:
            z = tl.load(gate + _starts(row, H, T, gate_b, gate_h, gate_t) + c, mask=mask, other=0.0)
            z = z.to(tl.float32)
        rstd = (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / d + eps))[:, None]
        x *= rstd
        if HAS_GATE:
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            if SILU:
                by_act = sigmoid * (1.0 + z * (1.0 - sigmoid))
                act = z * sigmoid
            else:
                by_act = sigmoid * (1.0 - sigmoid)
                act = sigmoid
            by_gate = by_norm * x * scale * by_act
            at = _starts(row, H, T, dgate_b, dgate_h, dgate_t) + c
            tl.store(dgate + at, by_gate.to(dgate.dtype.element_ty), mask=mask)
            by_norm *= act
        # A row past the end adds nothing, whatever eps makes of it.
        total += tl.where(mask, by_norm * x, 0.0)
        by_norm *= scale
        pull = (tl.sum(by_norm * x, axis=1) / d)[:, None]
        at = _starts(row, H, T, do_b, do_h, do_t) + c
        tl.store(do + at, (rstd * (by_norm - x * pull)).to(do.dtype.element_ty), mask=mask)
    at = tl.program_id(0).to(tl.int64) * d + tl.arange(0, BLOCK_D)
    tl.store(parts + at, tl.sum(total, axis=0), mask=tl.arange(0, BLOCK_D) < d)


def _types(constants: dict) -> dict[str, str]:
    types = dict.fromkeys(("g", "o", "gate", "y", "do", "dgate"), "*bf16")
    types |= dict.fromkeys(("gain", "parts"), "*fp32") | dict.fromkeys(
        ("rows", "H", "T", "d", "steps"), "i32"
    )
    strides = (f"{name}_{axis}" for name in ("g", "o", "gate", "y", "do", "dgate") for axis in "bht")
    return types | dict.fromkeys(strides, "i64") | {"eps": "fp32"}


_CASES = {
    "d64": {"HAS_GATE": True, "SILU": True, "BLOCK_D": 64},
    "d128": {"HAS_GATE": True, "SILU": True, "BLOCK_D": 128},
    "d128_sigmoid": {"HAS_GATE": True, "SILU": False, "BLOCK_D": 128},
    "d128_norm": {"HAS_GATE": False, "SILU": True, "BLOCK_D": 128},
    "d1024": {"HAS_GATE": True, "SILU": True, "BLOCK_D": 1024},
}
FORWARD = Kernel(
    "norm_gate_forward",
    forward,
    (Tile({"BLOCK": 1024}, 4, 1), Tile({"BLOCK": 2048}, 4, 1), Tile({"BLOCK": 4096}, 8, 1)),
    _CASES,
    _types,
)
BACKWARD = Kernel(
    "norm_gate_backward",
    backward,
    (Tile({"BLOCK": 1024}, 4, 1), Tile({"BLOCK": 2048}, 4, 1), Tile({"BLOCK": 2048}, 8, 1)),
    _CASES,
    _types,
)
KERNELS: list[Kernel] = [FORWARD, BACKWARD]
