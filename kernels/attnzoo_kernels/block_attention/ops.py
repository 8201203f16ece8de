"""Attention to listed blocks as custom ops of torch, over the Triton kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnzoo_kernels import launch
from attnzoo_kernels.attention.ops import row_deltas, shared
from attnzoo_kernels.block_attention.reference import block_attention_reference
from attnzoo_kernels.span import Span


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


class _Call:
    """Arguments and constants that the kernels share."""

    def __init__(self, q, k, v, blocks, own, first, window, n_sink, query_block, key_block, scale):
        self.B, self.L, self.T = q.shape[0], blocks.shape[1], q.shape[2]
        self.shared, self.query_block = q.shape[1] // self.L, query_block
        self.x, self.constants = shared(q, k, v, own, first, window, n_sink)
        self.x |= {
            "blocks": blocks.int().contiguous(), "L": self.L, "number": blocks.shape[3],
            "scale": scale * math.log2(math.e), "factor": scale,
        }
        self.constants |= {"QUERY_BLOCK": query_block, "KEYS": key_block}

    def tile(self, rows: int) -> dict[str, int]:
        """Queries and rows of a tile of about ``rows``."""
        queries = min(self.query_block, max(1, launch.power_of_2(rows // self.shared + 1) // 2))
        return {"QUERIES": queries, "ROWS": launch.power_of_2(queries * self.shared, 16)}

    def run(self, kernel: launch.Kernel, tiles: int, **more) -> None:
        values = self.x | self.constants | more

        def start(tile: launch.Tile) -> None:
            kernel.start(tile, (tiles, self.B * self.L), values)

        key = (*self.constants.values(), values["ROWS"], launch.bucket(self.T), str(self.x["q"].dtype))
        start(launch.tuner.pick(kernel, key, self.x["q"].device, start))


@torch.library.custom_op("attnzoo::block_attention_forward", mutates_args=())
def block_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, own: Tensor, first: Tensor, window: int, n_sink: int,
    query_block: int, key_block: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from attnzoo_kernels.block_attention import kernel as kernels

    call = _Call(q, k, v, blocks, own, first, window, n_sink, query_block, key_block, scale)
    o = _empty(q, (*q.shape[:3], v.shape[-1]), q.dtype)
    lse = _empty(q, tuple(q.shape[:3]), torch.float32)
    tile = call.tile(kernels.ROWS)
    call.run(kernels.FORWARD, -(-call.T // tile["QUERIES"]), o=o, lse=lse, **tile)
    return o, lse


@block_attention_forward.register_fake
def _(q, k, v, blocks, own, first, *options):
    return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("attnzoo::block_attention_backward", mutates_args=())
def block_attention_backward(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor,
    own: Tensor, first: Tensor, window: int, n_sink: int, query_block: int, key_block: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from attnzoo_kernels.block_attention import kernel as kernels

    call = _Call(q, k, v, blocks, own, first, window, n_sink, query_block, key_block, scale)
    (B, H, T, d), (_, G, S, _), L, d_v = q.shape, k.shape, call.L, v.shape[-1]
    do, deltas = do.contiguous(), _empty(q, (B, H, T), torch.float32)
    row_deltas(o, do, dlse, deltas, call.constants["WIDE_V"])
    dq = _empty(q, tuple(q.shape), q.dtype)
    shared = {"do": do, "lse": lse, "deltas": deltas}
    tile = call.tile(kernels.ROWS)
    call.run(kernels.QUERIES, -(-T // tile["QUERIES"]), **shared, **tile, dq=dq)
    number = -(-S // key_block)
    offsets, readers = _readers(call.x["blocks"], number)
    wide = q.dtype if L == G else torch.float32
    dk, dv = _empty(q, (B, L, S, d), wide), _empty(q, (B, L, S, d_v), wide)
    lists = {"offsets": offsets, "readers": readers, "entries": readers.shape[1]}
    call.run(kernels.KEYS, number, **shared, **lists, **call.tile(kernels.ROWS_OF_KEYS), dk=dk, dv=dv)
    if L != G:
        dk, dv = (x.unflatten(1, (G, -1)).sum(2).to(q.dtype) for x in (dk, dv))
    return dq, dk, dv


def _readers(blocks: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Lists turned round: offsets (B*L, number + 1) into the query blocks that list each key block."""
    listed = blocks.flatten(0, 1).flatten(1)
    order = torch.where(listed < 0, number, listed).sort(dim=1, stable=True)
    wanted = torch.arange(number + 1, device=blocks.device, dtype=blocks.dtype).expand(len(listed), -1)
    offsets = torch.searchsorted(order.values, wanted.contiguous())
    return offsets.int(), (order.indices // blocks.shape[3]).int()


@block_attention_backward.register_fake
def _(do, dlse, o, lse, q, k, v, blocks, own, first, *options):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.window, ctx.n_sink, ctx.query_block, ctx.key_block, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    options = ctx.window, ctx.n_sink, ctx.query_block, ctx.key_block, ctx.scale
    return *block_attention_backward(do, dlse, o, lse, *tensors, *options), *[None] * 8


block_attention_forward.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.attnzoo.block_attention_forward)
def _forward_flops(q, k, v, blocks, own, first, window, n_sink, query_block, key_block, *_, **__) -> int:
    """As if every list were full."""
    B, H, T, d = q
    return 2 * B * H * T * blocks[3] * key_block * (d + v[-1])


@register_flop_formula(torch.ops.attnzoo.block_attention_backward)
def _backward_flops(
    do, dlse, o, lse, q, k, v, blocks, own, first, window, n_sink, query_block, key_block, *_, **__
) -> int:
    B, H, T, d = q
    return 2 * B * H * T * blocks[3] * key_block * (4 * d + 3 * v[-1])


def block_attention_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    span: Span,
    query_block: int,
    key_block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As the public function; first derivatives only."""
    options = span.window or 0, span.n_sink, query_block, key_block, float(scale)
    return block_attention_forward(q, k, v, blocks, span.own, span.first, *options)


def worst(device: torch.device) -> tuple[float, float]:
    """Largest relative error of values and gradients on small cases, and what rounding explains."""
    draw = torch.Generator().manual_seed(0)
    shapes = (2, 8, 200, 64), (2, 2, 200, 64), (2, 2, 200, 64), (2, 8, 200, 64)
    q, k, v, do = (torch.randn(*shape, generator=draw).to(device) for shape in shapes)
    error, span = 0.0, Span.causal(200, 200, device)
    for query_block, lists in ((64, 8), (1, 2)):
        count = -(-200 // query_block)
        blocks = torch.rand(2, lists, count, 7, generator=draw).argsort(-1)[..., :4].int().to(device)
        blocks[:, :, :, 3] = -1
        found = []
        for run in (block_attention_kernels, block_attention_reference):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            o, _ = run(*leaves, blocks, span, query_block, 32, 0.125)
            found.append((o.detach(), *torch.autograd.grad(o, leaves, do)))
        for got, exact in zip(*found, strict=True):
            error = max(error, ((got - exact).abs().max() / exact.abs().max()).item())
    return error, 2e-2 if launch.precision() == "tf32" else 2e-4
