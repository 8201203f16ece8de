"""Attention mixed across heads as custom ops of torch, over the Triton kernels.

The ops know a mix as ``square (B,T,H,H) or (1,1,H,H)``, what does not depend on the key, and the maps of the
keys with keys last, ``(B, 2 I + 1, H, S)``, both in fp32; torch makes them, and differentiates that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnzoo_kernels import launch
from attnzoo_kernels.compose.chunks import Chunks, Stage, _empty
from attnzoo_kernels.compose.reference import Mix, compose_reference, matrix
from attnzoo_kernels.span import Span


@torch.library.custom_op("attnzoo::compose_forward", mutates_args=())
def compose_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    own: Tensor,
    window: int,
    n_sink: int,
    pre: Tensor | None,
    pre_key: Tensor | None,
    post: Tensor | None,
    post_key: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o (B,H,T,d_v), and the rows' statistics (2,B,H,T) that `kernel_mix.stats` describes."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    o = _empty(q, (*q.shape[:3], v.shape[-1]), v.dtype)
    stat = _empty(q, (2, *q.shape[:3]), torch.float32)
    chunks = Chunks(q, k.shape[2], first, own, window, n_sink, buffers=2)
    before, after = Stage(pre, pre_key, stat), Stage(post, post_key, stat)
    for _ in chunks:
        plain, mixed = _scores(chunks, q, k, before, stat, scale)
        chunks.stats(mixed, stat)
        p = chunks.buffer(1 if mixed is plain else 0, v.dtype)
        chunks.mix(after, mixed, stat, p, weights=True)
        chunks.product("rows", p, v, o)
    return o, stat


def _scores(
    chunks: Chunks, q: Tensor, k: Tensor, before: Stage, stat: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Scores before and after the first mix, in buffers 0 and 1; one tensor where it does nothing."""
    plain = chunks.buffer(0)
    chunks.product("pairs", q, k, plain, scale)
    if before.square is None and before.key is None:
        return plain, plain
    mixed = chunks.buffer(1)
    chunks.mix(before, plain, stat, mixed, weights=False)
    return plain, mixed


@compose_forward.register_fake
def _(q, k, v, first, own, window, n_sink, pre, pre_key, post, post_key, scale) -> tuple[Tensor, Tensor]:
    return v.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty((2, *q.shape[:3]), dtype=torch.float32)


@torch.library.custom_op("attnzoo::compose_backward", mutates_args=())
def compose_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stat: Tensor,
    first: Tensor,
    own: Tensor,
    window: int,
    n_sink: int,
    pre: Tensor | None,
    pre_key: Tensor | None,
    post: Tensor | None,
    post_key: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, pre, pre_key, post and post_key; those of None are empty."""
    g, q, k, v = (x.contiguous() for x in (g, q, k, v))
    chunks = Chunks(q, k.shape[2], first, own, window, n_sink, buffers=4)
    before, after = Stage(pre, pre_key, stat), Stage(post, post_key, stat)
    dq = _empty(q, tuple(q.shape), q.dtype)
    dk, dv = (_empty(x, tuple(x.shape), torch.float32) for x in (k, v))
    sums = _Sums(chunks, before), _Sums(chunks, after)
    for rows in chunks:
        plain, mixed = _scores(chunks, q, k, before, stat, scale)
        by_weights, p = chunks.buffer(2), chunks.buffer(3, v.dtype)
        chunks.product("pairs", g, v, by_weights)
        chunks.mix(after, mixed, stat, p, weights=True)
        chunks.product("cols", p, g, dv)
        by_p = chunks.buffer(3)
        by_m, by_row = chunks.unmix(after, mixed, stat, plain, by_weights, None, by_p, sums[1].key)
        sums[1].add(by_m, rows)
        ds = chunks.buffer(2, q.dtype)
        by_m, _ = chunks.unmix(before, mixed, stat, plain, by_p, by_row.sum(0), ds, sums[0].key)
        sums[0].add(by_m, rows)
        chunks.product("rows", ds, k, dq, scale)
        chunks.product("cols", ds, q, dk, scale)
    return dq, dk.to(k.dtype), dv.to(v.dtype), *sums[0].result(), *sums[1].result()


class _Sums:
    """Gradients of one stage's operands, over all chunks."""

    def __init__(self, chunks: Chunks, stage: Stage) -> None:
        from attnzoo_kernels.compose.kernel_mix import GROUP

        self.square, like = None, chunks.like
        self.whole = like.shape[0], like.shape[2]
        if stage.square is not None:
            self.square = _empty(like, tuple(stage.square.shape), torch.float32)
        self.has_key = stage.key is not None
        groups = -(-chunks.most // GROUP)
        self.key = _empty(like, (groups, *stage.key.shape) if self.has_key else (1,), torch.float32)

    def add(self, by_m: Tensor, rows: slice) -> None:
        if self.square is None:
            return
        if self.square.shape[:2] == self.whole:
            self.square[:, rows] = by_m.sum(0)
        else:
            part = by_m.sum((0, 1, 2))[None, None]
            self.square = part if rows.start == 0 else self.square + part

    def result(self) -> tuple[Tensor, Tensor]:
        square = self.key.new_empty(0) if self.square is None else self.square
        return square, self.key.sum(0) if self.has_key else self.key.new_empty(0)


@compose_backward.register_fake
def _(g, q, k, v, stat, first, own, window, n_sink, pre, pre_key, post, post_key, scale):
    mixes = (
        q.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape)
        for x in (pre, pre_key, post, post_key)
    )
    return tuple(x.new_empty(x.shape) for x in (q, k, v)) + tuple(mixes)


def _setup(ctx, inputs, output) -> None:
    q, k, v, first, own, window, n_sink, *mixes, scale = inputs
    ctx.save_for_backward(q, k, v, output[1], first, own, *mixes)
    ctx.numbers = window, n_sink, scale
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, g: Tensor, _) -> tuple[Tensor | None, ...]:
    q, k, v, stat, first, own, *mixes = ctx.saved_tensors
    window, n_sink, scale = ctx.numbers
    dq, dk, dv, *others = compose_backward(g, q, k, v, stat, first, own, window, n_sink, *mixes, scale)
    others = (None if x is None else dx for x, dx in zip(mixes, others, strict=True))
    return dq, dk, dv, None, None, None, None, *others, None


compose_forward.register_autograd(_backward, setup_context=_setup)


def _mixing_flops(T: int, S: int, square: tuple | None, key: tuple | None) -> int:
    """Of one sequence; shapes of a stage's operands."""
    flops = 0
    if square is not None:
        flops += 2 * T * S * square[-1] ** 2
    if key is not None:
        flops += 4 * T * S * key[2] * (key[1] // 2)
    return flops


@register_flop_formula(torch.ops.attnzoo.compose_forward)
def _forward_flops(
    q, k, v, first, own, window, n_sink, pre, pre_key, post, post_key, scale, *args, out_shape=None, **kwargs
) -> int:
    (B, H, T, d), (*_, S, d_v) = q, v
    mixing = _mixing_flops(T, S, pre, pre_key) + _mixing_flops(T, S, post, post_key)
    return B * (2 * H * T * S * (d + d_v) + mixing)


@register_flop_formula(torch.ops.attnzoo.compose_backward)
def _backward_flops(
    g,
    q,
    k,
    v,
    stat,
    first,
    own,
    window,
    n_sink,
    pre,
    pre_key,
    post,
    post_key,
    scale,
    *args,
    out_shape=None,
    **kwargs,
) -> int:
    (B, H, T, d), (*_, S, d_v) = q, v
    mixing = _mixing_flops(T, S, pre, pre_key) + _mixing_flops(T, S, post, post_key)
    return B * (2 * H * T * S * (3 * d + 2 * d_v) + 3 * mixing)


def compose_kernels(
    q: Tensor, k: Tensor, v: Tensor, span: Span, pre: Mix | None, post: Mix | None, scale: float
) -> Tensor:
    """As the public function."""
    operands = []
    with torch.autocast(q.device.type, enabled=False):
        for mix in (pre, post):
            key = None if mix is None else mix.key
            key = None if key is None else key.float().transpose(2, 3).contiguous()
            square = matrix(mix, q.shape[1], torch.float32)
            operands += [None if square is None else square.contiguous(), key]
        window = span.window or 0
        return compose_forward(q, k, v, span.first, span.own, window, span.n_sink, *operands, scale)[0]


def worst(device: torch.device) -> tuple[float, float]:
    """Largest error of result and gradients on a small case, and what rounding (also TF32's) explains."""
    draw = torch.Generator().manual_seed(0)
    shapes = (2, 4, 70, 32), (2, 4, 70, 32), (2, 4, 70, 48), *2 * ((4, 4), (2, 5, 70, 4), (2, 5, 70, 4))
    operands = [torch.randn(shape, generator=draw).to(device) * 0.5 for shape in shapes]
    weight = torch.randn(2, 4, 70, 48, generator=draw).to(device)
    span = Span.causal(70, 70, device, window=50, n_sink=2)
    results = []
    with torch.enable_grad():
        for run in (compose_kernels, compose_reference):
            q, k, v, *maps = leaves = [x.clone().requires_grad_() for x in operands]
            o = run(q, k, v, span, Mix(*maps[:3]), Mix(*maps[3:]), 32**-0.5)
            results.append([o.detach(), *torch.autograd.grad(o, leaves, weight)])
    rounding = 2e-2 if launch.precision() == "tf32" else 2e-4
    errors = [
        ((got - exact).abs().max() / exact.abs().max()).item() for got, exact in zip(*results, strict=True)
    ]
    return max(errors), rounding
