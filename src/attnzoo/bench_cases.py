"""What `attnzoo bench` times: for every op, its shapes and the sides that can do the same work."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.bench import Case, Side
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
    "scan": _scan,
    "latent_decode": _latent_decode,
    "entmax": _entmax,
}
