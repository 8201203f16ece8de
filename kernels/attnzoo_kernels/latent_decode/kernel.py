"""Flash-decoding over latents: partial results per split of the visible keys, then their merge.

All query heads share the one key head, so heads are the rows of the tensor-core tile, and a tile of latents
is loaded once to serve as keys and as values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.launch import NVIDIA, Kernel, Tile


@triton.jit
def partial(
    q, c, k_rope, first, own, o, lse, H, S, splits, scale, window, n_sink, first_b, own_b, c_b, r_b,
    D_C: tl.constexpr, D_R: tl.constexpr, C_S: tl.constexpr, R_S: tl.constexpr, UNIT: tl.constexpr,
    WIDE_C: tl.constexpr, WIDE_R: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """o (splits,B,H,D_C) and lse (splits,B,H), base 2, of one split.

    ``C_S``, ``R_S`` are elements between rows; ``c_b``, ``r_b`` between batches, in ``UNIT`` elements, which
    tells the compiler how loads are aligned; ``scale`` includes log2 e.
    """
    split, head_tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = head_tile * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, WIDE_C)
    e = tl.arange(0, WIDE_R)
    q += (b * H + h[:, None]) * (D_C + D_R)
    q_c = tl.load(q + d[None, :], mask=(h < H)[:, None] & (d < D_C)[None, :], other=0.0)
    if D_R > 0:
        q_r = tl.load(q + D_C + e[None, :], mask=(h < H)[:, None] & (e < D_R)[None, :], other=0.0)
    c += b * c_b * UNIT
    k_rope += b * r_b * UNIT

    # Visible keys are numbered 0..n-1, sinks first, so that splits are even whatever the window hides.
    start = tl.load(first + b * first_b)
    last = tl.minimum(tl.load(own + b * own_b), S - 1)
    low = tl.maximum(start, 0)
    sinks = 0
    if WINDOW:
        near = tl.maximum(low, last - window + 1)
        sinks = tl.maximum(tl.minimum(start + n_sink, near) - low, 0)
    else:
        near = low
    n = tl.where(start <= last, sinks + tl.maximum(last + 1 - near, 0), 0)
    size = tl.cdiv(n, splits)
    stop = tl.minimum((split + 1) * size, n)

    top = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, WIDE_C], tl.float32)
    for i in range(split * size, stop, BLOCK_S):
        at = i + tl.arange(0, BLOCK_S)
        j = tl.where(at < sinks, low + at, near + at - sinks).to(tl.int64)
        here = (at < stop)[:, None]
        rows = tl.load(c + j[:, None] * C_S + d[None, :], mask=here & (d < D_C)[None, :], other=0.0)
        s = tl.dot(q_c, tl.trans(rows), input_precision=PRECISION)
        if D_R > 0:
            turned = tl.load(
                k_rope + j[:, None] * R_S + e[None, :], mask=here & (e < D_R)[None, :], other=0.0
            )
            s = tl.dot(q_r, tl.trans(turned), s, input_precision=PRECISION)
        s = tl.where((at < stop)[None, :], s * scale, -float("inf"))
        new = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - new[:, None])
        decay = tl.exp2(top - new)
        total = total * decay + tl.sum(p, axis=1)
        acc = tl.dot(p.to(rows.dtype), rows, acc * decay[:, None], input_precision=PRECISION)
        top = new
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    row = (split * tl.num_programs(2) + b) * H + h
    tl.store(o + row[:, None] * D_C + d[None, :], acc, mask=(h < H)[:, None] & (d < D_C)[None, :])
    log = tl.log2(tl.where(total == 0, 1.0, total))
    tl.store(lse + row, tl.where(total == 0, -float("inf"), top + log), mask=h < H)


@triton.jit
def merge(part, lse, o, rows, splits, D_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """o (rows,D_C) from part (splits,rows,D_C) and lse (splits,rows): one row, a block of its columns."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    for i in range(0, splits, BLOCK_N):
        at = (i + n).to(tl.int64)
        top = tl.maximum(top, tl.load(lse + at * rows + row, mask=at < splits, other=-float("inf")))
    best = tl.max(top, axis=0)
    best = tl.where(best == -float("inf"), 0.0, best)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i in range(0, splits, BLOCK_N):
        at = (i + n).to(tl.int64)
        here = at < splits
        weight = tl.exp2(tl.load(lse + at * rows + row, mask=here, other=-float("inf")) - best)
        value = part + (at * rows + row)[:, None] * D_C + d[None, :]
        acc += weight[:, None] * tl.load(value, mask=here[:, None] & (d < D_C)[None, :], other=0.0)
        total += weight
    whole = tl.sum(total, axis=0)
    out = tl.sum(acc, axis=0) / tl.where(whole == 0, 1.0, whole)
    tl.store(o + row * D_C + d, out.to(o.dtype.element_ty), mask=d < D_C)


def _case(d_c: int, d_r: int, window: bool) -> dict[str, object]:
    """Rows of a cache that holds latent and rotary key side by side."""
    stride = d_c + d_r
    return {
        "D_C": d_c, "D_R": d_r, "C_S": stride, "R_S": stride, "UNIT": 16, "WIDE_C": d_c,
        "WIDE_R": max(d_r, 16), "WINDOW": window, "PRECISION": "ieee",
    }  # fmt: skip


_CASES = {
    "bf16_512+64": _case(512, 64, False),
    "bf16_512+64_window": _case(512, 64, True),
    "bf16_128": _case(128, 0, False),
}
_TYPES = (
    dict.fromkeys(("q", "c", "k_rope"), "*bf16")
    | dict.fromkeys(("first", "own"), "*i32")
    | dict.fromkeys(("o", "lse"), "*fp32")
    | dict.fromkeys(("H", "S", "splits", "window", "n_sink", "first_b", "own_b"), "i32")
    | {"scale": "fp32", "c_b": "i64", "r_b": "i64"}
)
PARTIAL = Kernel(
    "latent_decode_partial",
    partial,
    (
        Tile({"BLOCK_H": 16, "BLOCK_S": 32}, 4, 2),
        Tile({"BLOCK_H": 16, "BLOCK_S": 64}, 4, 2, NVIDIA),
        Tile({"BLOCK_H": 16, "BLOCK_S": 64}, 8, 2, NVIDIA),
        Tile({"BLOCK_H": 64, "BLOCK_S": 64}, 8, 2, ("sm_90",)),
    ),
    _CASES,
    _TYPES,
)
MERGE = Kernel(
    "latent_decode_merge",
    merge,
    (Tile({"BLOCK_N": 16, "BLOCK_C": 128}, 4, 1), Tile({"BLOCK_N": 8, "BLOCK_C": 64}, 2, 1)),
    {"bf16_512": {"D_C": 512}},
    {"part": "*fp32", "lse": "*fp32", "o": "*bf16", "rows": "i32", "splits": "i32"},
)
KERNELS: list[Kernel] = [PARTIAL, MERGE]
