"""Decoding over latents as a custom op of torch, over the Triton kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnzoo_kernels import launch
from attnzoo_kernels.latent_decode.reference import latent_decode_reference
from attnzoo_kernels.span import Span

# Multiprocessors of the GPU that the interpreter stands for.
MULTIPROCESSORS = 132


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _splits(programs: int, keys: int, block: int, device: torch.device) -> int:
    """So many that two waves fill the GPU, none of them shorter than a block."""
    number = MULTIPROCESSORS
    if device.type == "cuda":
        number = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-2 * number // programs), -(-keys // block)))


@torch.library.custom_op("attnzoo::latent_decode_forward", mutates_args=())
def latent_decode_forward(
    q: Tensor,
    c: Tensor,
    k_rope: Tensor | None,
    first: Tensor,
    own: Tensor,
    window: int,
    n_sink: int,
    scale: float,
) -> Tensor:
    from attnzoo_kernels.latent_decode import kernel as k

    (B, H, _, width), (_, S, d_c) = q.shape, c.shape
    d_r = width - d_c
    q = q.contiguous()
    c = c if c.stride(-1) == 1 else c.contiguous()
    turned = c if k_rope is None else k_rope if k_rope.stride(-1) == 1 else k_rope.contiguous()
    unit = 16 if c.stride(0) % 16 == turned.stride(0) % 16 == 0 else 1
    keys = min(S, window + n_sink) if window else S
    o = _empty(q, (B, H, 1, d_c), q.dtype)

    def merge(tile: launch.Tile, parts: Tensor, lse: Tensor) -> None:
        grid = (B * H, -(-d_c // tile.meta["BLOCK_C"]))
        k.MERGE.fn[grid](
            parts, lse, o, B * H, parts.shape[0], D_C=d_c, **tile.meta,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def run(tile: launch.Tile) -> tuple[Tensor, Tensor]:
        tiles = -(-H // tile.meta["BLOCK_H"])
        splits = _splits(B * tiles, keys, tile.meta["BLOCK_S"], q.device)
        parts = _empty(q, (splits, B, H, d_c), torch.float32)
        lse = _empty(q, (splits, B, H), torch.float32)
        k.PARTIAL.fn[(splits, tiles, B)](
            q, c, turned, first, own, parts, lse, H, S, splits, scale * math.log2(math.e), window, n_sink,
            *(x.stride(0) if x.shape[0] > 1 else 0 for x in (first, own)),
            *(x.stride(0) // unit for x in (c, turned)),
            D_C=d_c, D_R=d_r, C_S=c.stride(1), R_S=turned.stride(1), UNIT=unit,
            WIDE_C=launch.power_of_2(d_c, 16), WIDE_R=launch.power_of_2(d_r, 16) if d_r else 16,
            WINDOW=window > 0, PRECISION=launch.precision(), **tile.meta,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return parts, lse

    shape = (d_c, d_r, H, launch.power_of_2(B), launch.bucket(keys), str(q.dtype))
    parts, lse = run(launch.tuner.pick(k.PARTIAL, shape, q.device, run))
    merge(launch.tuner.pick(k.MERGE, shape, q.device, lambda tile: merge(tile, parts, lse)), parts, lse)
    return o


@latent_decode_forward.register_fake
def _(q, c, k_rope, first, own, window, n_sink, scale) -> Tensor:
    return q.new_empty((*q.shape[:3], c.shape[-1]))


@register_flop_formula(torch.ops.attnzoo.latent_decode_forward)
def _flops(q, c, k_rope, first, own, window, n_sink, scale, *args, out_shape=None, **kwargs) -> int:
    (B, H, _, width), (_, S, d_c) = q, c
    return 2 * B * H * (min(S, window + n_sink) if window else S) * (width + d_c)


def latent_decode_kernels(q: Tensor, c: Tensor, k_rope: Tensor | None, span: Span, scale: float) -> Tensor:
    """As the public function."""
    return latent_decode_forward(q, c, k_rope, span.first, span.own, span.window or 0, span.n_sink, scale)


def worst(device: torch.device) -> tuple[float, float]:
    """Largest error on a small case, and what rounding (also TF32's) explains."""
    draw = torch.Generator().manual_seed(0)
    q, c, k_rope = (
        torch.randn(*shape, generator=draw).to(device)
        for shape in ((2, 20, 1, 80), (2, 300, 64), (2, 300, 16))
    )
    first = torch.tensor([[3], [0]], dtype=torch.int32, device=device)
    own = torch.tensor([[299], [170]], dtype=torch.int32, device=device)
    error, bound = 0.0, 0.0
    with torch.no_grad():
        for span in (Span(first, own), Span(first, own, window=100, n_sink=4)):
            got = latent_decode_kernels(q, c, k_rope, span, 80**-0.5)
            exact = latent_decode_reference(q, c, k_rope, span, 80**-0.5)
            error = max(error, (got - exact).abs().max().item())
            bound = max(bound, exact.abs().max().item() * (1e-2 if launch.precision() == "tf32" else 1e-4))
    return error, bound
