"""Attention as custom ops of torch, over the Triton kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnzoo_kernels import launch
from attnzoo_kernels.attention.reference import attention_reference
from attnzoo_kernels.span import Span

# In the order of the kernels' constants.
CODES = {name: i for i, name in enumerate(
    ("softmax", "signed", "clipped_softmax", "sigmoid", "relu", "softplus_l1")
)}  # fmt: skip
NEVER = 2**31 - 1


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def shared(q: Tensor, k: Tensor, v: Tensor, own: Tensor, first: Tensor, window: int, n_sink: int) -> tuple:
    """Arguments and constants, by name, that all kernels of attention read: operands, strides and sizes."""
    # neighbours lie along the last axis; every other axis may have any stride
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (_, H, T, d), (_, G, S, _), d_v = q.shape, k.shape, v.shape[-1]
    strides = {
        f"{name}_{axis}": x.stride(i)
        for name, x, axes in (("q", q, "bht"), ("k", k, "bhs"), ("v", v, "bhs"))
        for i, axis in enumerate(axes)
    }
    values = {
        "q": q, "k": k, "v": v, "own": own.contiguous(), "first": first.contiguous(),
        "span_b": T if own.shape[0] > 1 else 0, "H": H, "G": G, "T": T, "S": S,
        "window": min(window, S), "n_sink": min(n_sink, S),
    }
    constants = {
        "D": d, "D_V": d_v, "WIDE": launch.power_of_2(d, 16), "WIDE_V": launch.power_of_2(d_v, 16),
        "WINDOW": window > 0, "PRECISION": launch.precision(),
    }
    return values | strides, constants


def row_deltas(o: Tensor, do: Tensor, dlse: Tensor | None, out: Tensor, wide: int) -> None:
    """do . o of every row into ``out`` (B,H,T) fp32, less the gradient of its log-sum-exp; do contiguous."""
    from attnzoo_kernels.attention.kernel_backward import DELTA

    values = {
        "o": o.contiguous(), "do": do, "out": out, "rows": out.numel(), "D_V": o.shape[-1],
        "dlse": out if dlse is None else dlse.float().contiguous(), "LSE": dlse is not None,
        "WIDE_V": wide,
    }

    def start(tile: launch.Tile) -> None:
        DELTA.start(tile, (-(-out.numel() // tile.meta["BLOCK"]),), values | tile.meta)

    key = (wide, dlse is not None, launch.bucket(out.numel()), str(o.dtype))
    start(launch.tuner.pick(DELTA, key, o.device, start))


class _Call:
    """Arguments and constants that the forward and backward kernels share."""

    def __init__(self, q, k, v, own, first, window, n_sink, normaliser, scale, bias, clip, cap, slopes):
        (self.B, self.H, self.T, d), (_, self.G, self.S, _), self.d_v = q.shape, k.shape, v.shape[-1]
        self.q = q
        self.width = next(width for width in (64, 128, 256) if max(d, self.d_v) <= width)
        self.x, self.constants = shared(q, k, v, own, first, window, n_sink)
        unit = 1.0 if normaliser == "relu" else math.log2(math.e)
        self.x |= {
            "slopes": self._fp32(slopes), "biases": self._fp32(bias), "unit": unit, "factor": scale,
            "scale": scale / cap if cap else scale * unit, "cap": cap * unit,
            "low": clip[0], "high": clip[1],
        }
        self.constants |= {
            "NORM": CODES[normaliser], "CAP": cap > 0,
            "SLOPES": slopes is not None, "BIAS": bias is not None,
        }

    def _fp32(self, x: Tensor | None) -> Tensor:
        return self.q if x is None else x.float().contiguous()

    def run(self, kernel: launch.Kernel, grid, prepare=None, **more) -> None:
        """Tunes and launches; ``grid`` and ``prepare`` (more arguments) are functions of the tile's sizes."""
        values = self.x | self.constants | more

        def start(tile: launch.Tile) -> None:
            late = {} if prepare is None else prepare(tile.meta)
            kernel.start(tile, grid(tile.meta), values | tile.meta | late)

        flags = tuple(self.constants.values())
        key = (*flags, launch.power_of_2(self.B * self.H), launch.bucket(self.T), str(self.q.dtype))
        start(launch.tuner.pick(kernel, key, self.q.device, start))


@torch.library.custom_op("attnzoo::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, own: Tensor, first: Tensor, bias: Tensor | None, sink: Tensor | None,
    slopes: Tensor | None, window: int, n_sink: int, normaliser: str, scale: float, low: float, high: float,
    cap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o, and per row the log-sum-exp or the sum of softplus (empty for sigmoid and relu)."""
    from attnzoo_kernels.attention import kernel_forward as kernels

    call = _Call(q, k, v, own, first, window, n_sink, normaliser, scale, bias, (low, high), cap, slopes)
    o = _empty(q, (call.B, call.H, call.T, call.d_v), q.dtype)
    saved = _empty(q, _saved_shape(q, normaliser), torch.float32)
    call.run(
        kernels.FORWARD[call.width],
        lambda meta: (-(-call.T // meta["BLOCK_M"]), call.B * call.H),
        o=o, saved=saved, sinks_of=call._fp32(sink), SINK=sink is not None,
    )  # fmt: skip
    return o, saved


def _saved_shape(q: Tensor, normaliser: str) -> tuple[int, ...]:
    return (0,) if normaliser in ("sigmoid", "relu") else tuple(q.shape[:3])


@attention_forward.register_fake
def _(q, k, v, own, first, bias, sink, slopes, window, n_sink, normaliser, scale, low, high, cap):
    o = q.new_empty((*q.shape[:3], v.shape[-1]))
    return o, q.new_empty(_saved_shape(q, normaliser), dtype=torch.float32)


@torch.library.custom_op("attnzoo::attention_backward", mutates_args=())
def attention_backward(
    do: Tensor, dlse: Tensor | None, o: Tensor, saved: Tensor, q: Tensor, k: Tensor, v: Tensor, own: Tensor,
    first: Tensor, bias: Tensor | None, slopes: Tensor | None, window: int, n_sink: int, normaliser: str,
    scale: float, low: float, high: float, cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, the rows' delta, and with a bias the rows' sums of the scores' gradient."""
    from attnzoo_kernels.attention import kernel_backward as kernels

    call = _Call(q, k, v, own, first, window, n_sink, normaliser, scale, bias, (low, high), cap, slopes)
    B, H, T, G, S = call.B, call.H, call.T, call.G, call.S
    do = do.contiguous()
    deltas = _empty(q, (B, H, T), torch.float32)
    if normaliser != "clipped_softmax":
        row_deltas(o, do, dlse, deltas, call.constants["WIDE_V"])
    dq, dk, dv = (_empty(q, tuple(x.shape), q.dtype) for x in (q, k, v))
    sums = _empty(q, (B, H, T) if bias is not None else (0,), torch.float32)
    shared = {"do": do, "saved": saved, "deltas": deltas}
    call.run(
        kernels.QUERIES[call.width],
        lambda meta: (-(-T // meta["BLOCK_M"]), B * H),
        **shared, dq=dq, dbiases=sums,
    )  # fmt: skip
    sees = own >= first
    orders = [torch.where(sees, x, NEVER).contiguous() for x in (own, first)]
    call.run(
        kernels.KEYS[call.width],
        lambda meta: (-(-S // meta["BLOCK_N"]), B * G),
        lambda meta: {"limits": _limits(call, kernels.BOUNDS, *orders, meta["BLOCK_N"])},
        **shared, dk=dk, dv=dv,
    )  # fmt: skip
    return dq, dk, dv, deltas, sums


def _limits(call: _Call, kernel: launch.Kernel, own: Tensor, first: Tensor, block: int) -> Tensor:
    """Rows that see each tile of keys, (B or 1, 2, tiles); see the kernel."""
    tiles, batch = -(-call.S // block), own.shape[0]
    out = torch.empty(batch, 2, tiles, dtype=torch.int32, device=own.device)
    size = kernel.tiles[0].meta["BLOCK"]
    kernel.fn[(-(-tiles // size), batch)](
        own, first, out, call.T, launch.power_of_2(call.T), call.S, tiles, call.x["window"], call.x["n_sink"],
        WINDOW=call.constants["WINDOW"], BLOCK_N=block, BLOCK=size, num_warps=kernel.tiles[0].warps,
    )  # fmt: skip
    return out


@attention_backward.register_fake
def _(do, dlse, o, saved, q, k, v, own, first, bias, slopes, *options):
    rows = q.new_empty(q.shape[:3], dtype=torch.float32)
    sums = torch.empty_like(rows) if bias is not None else rows.new_empty(0)
    return *(x.new_empty(x.shape) for x in (q, k, v)), rows, sums


def _setup(ctx, inputs, output) -> None:
    q, k, v, own, first, bias, sink, slopes, *ctx.options = inputs
    o, saved = output
    ctx.save_for_backward(q, k, v, own, first, bias, sink, slopes, o, saved)
    ctx.set_materialize_grads(False)


def _backward(ctx, do: Tensor | None, dsaved: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, own, first, bias, sink, slopes, o, saved = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    if saved.numel() == 0 or ctx.options[2] not in ("softmax", "signed"):
        dsaved = None
    dq, dk, dv, deltas, sums = attention_backward(
        do, dsaved, o, saved, q, k, v, own, first, bias, slopes, *ctx.options
    )
    dbias = None if bias is None else sums.sum((0, 2)).to(bias.dtype)
    dsink = None
    if sink is not None:
        weight = (sink.float()[:, None] - saved).exp().masked_fill(saved == -torch.inf, 0.0)
        dsink = -(weight * deltas).sum((0, 2)).to(sink.dtype)
    return dq, dk, dv, None, None, dbias, dsink, None, *[None] * len(ctx.options)


attention_forward.register_autograd(_backward, setup_context=_setup)


def _pairs(q: torch.Size, k: torch.Size, window: int, n_sink: int) -> int:
    """Products of a row with a key that a causal kernel makes, without documents."""
    (B, H, T, _), S = q, k[2]
    reach = window + n_sink if window else S
    return B * H * sum(min(own + 1, reach) for own in range(S - T, S)) if S >= T else B * H * T * S


@register_flop_formula(torch.ops.attnzoo.attention_forward)
def _forward_flops(q, k, v, own, first, bias, sink, slopes, window, n_sink, normaliser, *_, **__) -> int:
    products = q[-1] * (2 if normaliser == "clipped_softmax" else 1) + v[-1]
    return 2 * _pairs(q, k, window, n_sink) * products


@register_flop_formula(torch.ops.attnzoo.attention_backward)
def _backward_flops(
    do, dlse, o, saved, q, k, v, own, first, bias, slopes, window, n_sink, normaliser, *_, **__
) -> int:
    products = 4 * q[-1] + 3 * v[-1]
    if normaliser == "clipped_softmax":
        products += q[-1] + v[-1]
    return 2 * _pairs(q, k, window, n_sink) * products


def attention_kernels(
    q: Tensor, k: Tensor, v: Tensor, span: Span, normaliser: str, scale: float, bias: Tensor | None,
    sink: Tensor | None, clip: tuple[float, float], cap: float | None, slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the public function; first derivatives only."""
    return attention_forward(
        q, k, v, span.own, span.first, bias, sink, slopes, span.window or 0, span.n_sink, normaliser,
        float(scale), *map(float, clip), float(cap or 0.0),
    )  # fmt: skip


def worst(device: torch.device) -> tuple[float, float]:
    """Largest error of values and gradients on small cases, and what rounding (also TF32's) explains."""
    draw = torch.Generator().manual_seed(0)
    shapes = (2, 4, 200, 64), (2, 2, 200, 64), (2, 2, 200, 64), (2, 4, 200, 64)
    q, k, v, do = (torch.randn(*shape, generator=draw).to(device) for shape in shapes)
    own = torch.arange(200, dtype=torch.int32, device=device)[None]
    first = torch.where(own < 77, 0, 77).int()
    error, bound = 0.0, 0.0
    for i, normaliser in enumerate(CODES):
        span = Span(first, own, window=50 if i % 2 else None, n_sink=3 if i % 2 else 0)
        found = []
        for run in (attention_kernels, attention_reference):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            o, _ = run(*leaves, span, normaliser, 0.125, None, None, (-0.03, 1.0), None, None)
            found.append((o.detach(), *torch.autograd.grad(o, leaves, do)))
        for got, exact in zip(*found, strict=True):
            error = max(error, (got - exact).abs().max().item() / exact.abs().max().item())
            bound = 2e-2 if launch.precision() == "tf32" else 2e-4
    return error, bound
