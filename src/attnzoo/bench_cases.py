"""What `attnzoo bench` times: for every op, its shapes and the sides that can do the same work."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.bench import Case, Side
from attnzoo_kernels.attention import NORMALISERS
from attnzoo_kernels.span import Span

TOKENS = 32768  # of a batch: lengths share it, so that every row has as much work for linear ops


def cases(op: str, lengths: list[int], head_dims: list[int], device: torch.device) -> Iterator[Case]:
    """The grid of one op; a CPU gets one row per batch and fp32, a GPU 32k tokens and bf16."""
    for T in lengths:
        for d in head_dims:
            yield from OPS[op](T, d, device)


def _random(device: torch.device, *shapes: tuple[int, ...], grad: bool = True) -> tuple[Tensor, ...]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return tuple(torch.randn(s, device=device, dtype=dtype, requires_grad=grad) for s in shapes)


def _batch(T: int, device: torch.device) -> int:
    return max(1, TOKENS // T) if device.type == "cuda" else 1


def _heads(d: int, device: torch.device) -> int:
    return 1024 // d if device.type == "cuda" else 2


def _op(module: str, name: str, **options: object) -> Callable[[], Side]:
    def make() -> Side:
        return partial(getattr(importlib.import_module(f"attnzoo_kernels.{module}"), name), **options)

    return make


def _attention(T: int, d: int, device: torch.device) -> Iterator[Case]:
    shape = (_batch(T, device), _heads(d, device), T, d)
    span = Span.causal(T, T, device)
    sdpa = partial(F.scaled_dot_product_attention, is_causal=True)

    def backend(name: str) -> Callable[[], Side]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            with sdpa_kernel(getattr(SDPBackend, name)):
                return sdpa(q, k, v)

        return lambda: run

    def flex(change: Callable | None) -> Callable[[], Side]:
        def make() -> Side:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, T, T, device=device)
            return partial(torch.compile(flex_attention), score_mod=change, block_mask=mask)

        return make

    sides = {
        "sdpa-flash": backend("FLASH_ATTENTION"),
        "sdpa-cudnn": backend("CUDNN_ATTENTION"),
        "flex": flex(None),
    }
    for normaliser in NORMALISERS:
        options = {"clip": (-0.03, 1.0)} if normaliser == "clipped_softmax" else {}
        ours = lambda normaliser=normaliser, options=options: partial(  # noqa: E731
            _op("attention", "attention", normaliser=normaliser, **options)(), span=span
        )
        operands = partial(_random, device, shape, shape, shape)
        yield Case("attention", normaliser, T, d, operands, {"attnzoo": ours} | sides)


def _block_attention(T: int, d: int, device: torch.device) -> Iterator[Case]:
    size, chosen = 64, 16
    B, H, count = _batch(T, device), _heads(d, device), -(-T // 64)
    own = torch.arange(count, device=device)
    drawn = torch.rand(count, count, device=device).masked_fill(own >= own[:, None], -1.0)
    likely, past = drawn.topk(min(chosen - 1, count))
    blocks = torch.cat([own[:, None], past.masked_fill(likely < 0, -1)], 1)
    blocks = blocks.expand(B, H, *blocks.shape).contiguous()
    ours = _op(
        "block_attention",
        "block_attention",
        blocks=blocks,
        span=Span.causal(T, T, device),
        query_block=size,
        key_block=size,
    )

    def flex() -> Side:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        listed = blocks[0, 0].masked_fill(blocks[0, 0] < 0, count)
        table = torch.zeros(count, count + 1, dtype=torch.bool, device=device).scatter_(1, listed, True)
        rule = lambda b, h, i, j: (j <= i) & table[i // size, j // size]  # noqa: E731
        mask = create_block_mask(rule, None, None, T, T, device=device)
        return partial(torch.compile(flex_attention), block_mask=mask)

    dense = lambda: partial(F.scaled_dot_product_attention, is_causal=True)  # noqa: E731
    sides = {"attnzoo": ours, "flex": flex, "sdpa-dense": dense}
    shape = (B, H, T, d)
    yield Case(
        "block_attention", f"{chosen} of {size}", T, d, partial(_random, device, shape, shape, shape), sides
    )


def _compose(T: int, d: int, device: torch.device) -> Iterator[Case]:
    B, H, rank = max(1, _batch(T, device) // 8), 16 if device.type == "cuda" else 4, 2
    shape, rows = (B, H, T, d), (B, 2 * rank + 1, T, H)
    span = Span.causal(T, T, device)

    def run(q, k, v, static, query, key, impl):
        from attnzoo_kernels.compose import Mix, compose

        mix = Mix(static, 0.1 * query, 0.1 * key)
        return compose(q, k, v, span, pre=mix, post=mix, scale=d**-0.5, impl=impl)

    operands = partial(_random, device, shape, shape, shape, (H, H), rows, rows)
    sides = {
        "attnzoo": lambda: partial(run, impl="auto"),
        "compiled eager": lambda: torch.compile(partial(run, impl="reference")),
    }
    yield Case("compose", f"{H} heads", T, d, operands, sides)


def _scan(T: int, d: int, device: torch.device) -> Iterator[Case]:
    B, H = _batch(T, device), _heads(d, device)
    rivals = {
        "scalar": ("simple_gla", "chunk_simple_gla"),
        "diagonal": ("gla", "chunk_gla"),
        "delta": ("delta_rule", "chunk_delta_rule"),
        "gated delta": ("gated_delta_rule", "chunk_gated_delta_rule"),
    }
    for what, (module, name) in rivals.items():

        def operands(what: str = what) -> tuple[Tensor, ...]:
            q, k, v = _random(device, *[(B, T, H, d)] * 3)
            k = F.normalize(k.detach().float(), dim=-1).to(k.dtype).requires_grad_()
            shape = (B, T, H, d) if what == "diagonal" else (B, T, H)
            g = F.logsigmoid(torch.randn(shape, device=device)).div(16).requires_grad_()
            beta = torch.rand(B, T, H, device=device).to(q.dtype).requires_grad_()
            return {"delta": (q, k, v, beta), "gated delta": (q, k, v, g, beta)}.get(what, (q, k, v, g))

        def fla(module: str = module, name: str = name) -> Side:
            run = getattr(importlib.import_module(f"fla.ops.{module}"), name)
            return lambda *x: run(*x)[0]

        def ours(what: str = what) -> Side:
            run = _op("scan", "scan")()
            return (
                (lambda q, k, v, beta: run(q, k, v, None, beta)[0])
                if what == "delta"
                else lambda *x: run(*x)[0]
            )

        yield Case("scan", what, T, d, operands, {"attnzoo": ours, "fla": fla})


def _short_conv(T: int, d: int, device: torch.device) -> Iterator[Case]:
    B, C = _batch(T, device), 16 * d if device.type == "cuda" else 4 * d

    def conv1d(x: Tensor, weight: Tensor) -> Tensor:
        y = F.conv1d(F.pad(x.mT, (3, 0)), weight.unsqueeze(1), groups=C)
        return F.silu(y).mT

    sides = {"attnzoo": _op("short_conv", "short_conv", activation="silu"), "conv1d": lambda: conv1d}
    yield Case("short_conv", f"{C} channels", T, d, partial(_random, device, (B, T, C), (C, 4)), sides)


def _norm_gate(T: int, d: int, device: torch.device) -> Iterator[Case]:
    shape = (_batch(T, device), T, _heads(d, device), d)

    def eager(o: Tensor, gain: Tensor, gate: Tensor) -> Tensor:
        return F.rms_norm(o, (d,), gain, 1e-5) * F.silu(gate)

    sides = {
        "attnzoo": _op("norm_gate", "norm_gate", activation="silu"),
        "compiled eager": lambda: torch.compile(eager),
    }
    yield Case("norm_gate", "silu", T, d, partial(_random, device, shape, (d,), shape), sides)


def _latent_decode(T: int, d: int, device: torch.device) -> Iterator[Case]:
    B, H = (64, 128) if device.type == "cuda" else (1, 4)
    width, rope = 8 * d, d
    if device.type == "cuda" and width != 512:
        return
    span = Span.causal(1, T, device)
    shapes = (B, H, 1, width + rope), (B, T, width), (B, T, rope)
    operands = partial(_random, device, *shapes, grad=False)
    scale = (2 * d) ** -0.5

    def sdpa(q: Tensor, c: Tensor, k_rope: Tensor) -> Tensor:
        k = torch.cat([c, k_rope], -1)[:, None]
        return F.scaled_dot_product_attention(q, k, c[:, None], scale=scale, enable_gqa=True)

    sides = {"attnzoo": _op("latent_decode", "latent_decode", span=span, scale=scale), "sdpa": lambda: sdpa}
    moved = B * T * (width + rope) * (2 if device.type == "cuda" else 4)
    yield Case("latent_decode", f"{H} heads", T, d, operands, sides, bytes_read=moved, backward=False)


def _entmax(T: int, d: int, device: torch.device) -> Iterator[Case]:
    rows = 512 if device.type == "cuda" else 16
    alpha = torch.full((8,), 1.5, device=device)
    sides = {
        "attnzoo": _op("entmax", "entmax", alpha=alpha),
        "reference": _op("entmax", "entmax", alpha=alpha, impl="reference"),
        "softmax": lambda: partial(torch.softmax, dim=-1),
    }
    yield Case("entmax", f"{rows} rows", T, d, partial(_random, device, (1, 8, rows, T)), sides)


OPS: dict[str, Callable[[int, int, torch.device], Iterator[Case]]] = {
    "attention": _attention,
    "block_attention": _block_attention,
    "compose": _compose,
    "scan": _scan,
    "short_conv": _short_conv,
    "norm_gate": _norm_gate,
    "latent_decode": _latent_decode,
    "entmax": _entmax,
}
