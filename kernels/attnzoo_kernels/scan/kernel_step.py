"""One token of every transition class: a block of a state is read, changed, read out and written once."""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.launch import Kernel, Tile

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def step(
    state, q, k, v, g, beta, e, a, fresh, o, out, scale, H, K, V,
    KP: tl.constexpr, GATE: tl.constexpr, DELTA: tl.constexpr, RANK_ONE: tl.constexpr, FRESH: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """o (B,H,V) and out (B,H,K,V). GATE: 0 none, 1 (B,H), 2 (B,H,K); fresh (B,) drops the state."""
    x = tl.program_id(0).to(tl.int64)
    d, c = tl.arange(0, KP), tl.program_id(1) * BV + tl.arange(0, BV)
    inside, columns = d < K, c < V
    mask = inside[:, None] & columns[None, :]
    at = x * K * V + d[:, None] * V + c[None, :]
    s = tl.load(state + at, mask=mask, other=0.0)
    if FRESH:
        s = tl.where(tl.load(fresh + x // H) != 0, 0.0, s)
    key = tl.load(k + x * K + d, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(v + x * V + c, mask=columns, other=0.0).to(tl.float32)
    if RANK_ONE:
        probe = tl.load(a + x * K + d, mask=inside, other=0.0).to(tl.float32)
        read = tl.sum(probe[:, None] * s, 0)
    if GATE == 1:
        s = s * tl.exp2(tl.load(g + x).to(tl.float32) * LOG2_E)
    if GATE == 2:
        s = s * tl.exp2(tl.load(g + x * K + d, mask=inside, other=0.0).to(tl.float32) * LOG2_E)[:, None]
    if DELTA:
        value = tl.load(beta + x).to(tl.float32) * (value - tl.sum(key[:, None] * s, 0))
    s += key[:, None] * value[None, :]
    if RANK_ONE:
        s += tl.load(e + x * K + d, mask=inside, other=0.0).to(tl.float32)[:, None] * read[None, :]
    query = tl.load(q + x * K + d, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(o + x * V + c, tl.sum(query[:, None] * s, 0).to(o.dtype.element_ty), mask=columns)
    tl.store(out + at, s, mask=mask)


_PLAIN = {"KP": 128, "GATE": 1, "DELTA": False, "RANK_ONE": False, "FRESH": True}
STEP = Kernel(
    "scan_step",
    step,
    (Tile({"BV": 32}, 4, 1), Tile({"BV": 16}, 4, 1), Tile({"BV": 64}, 8, 1)),
    {
        "bf16_128_scalar": _PLAIN,
        "bf16_128_delta": _PLAIN | {"DELTA": True},
        "bf16_128_diagonal_rank_one": _PLAIN | {"GATE": 2, "RANK_ONE": True},
    },
    dict.fromkeys(("q", "k", "v", "e", "a", "o"), "*bf16")
    | dict.fromkeys(("state", "out", "g", "beta"), "*fp32")
    | dict.fromkeys(("H", "K", "V"), "i32")
    | {"fresh": "*i8", "scale": "fp32"},
)
KERNELS: list[Kernel] = [STEP]
