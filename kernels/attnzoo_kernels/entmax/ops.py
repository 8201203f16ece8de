"""alpha-entmax as custom ops of torch, over the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.entmax.reference import entmax_reference


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


@torch.library.custom_op("attnzoo::entmax_forward", mutates_args=())
def entmax_forward(scores: Tensor, alpha: Tensor, visible: Tensor | None, n_iter: int) -> Tensor:
    from attnzoo_kernels.entmax import kernel as k

    B, H, T, S = scores.shape
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    p = _empty(scores, (B, H, T, S), scores.dtype)
    seen = scores.new_ones(1, 1, 1, 1, dtype=torch.bool) if visible is None else visible
    if visible is not None:
        seen = (visible if visible.stride(-1) == 1 else visible.contiguous()).expand(B, H, T, S)
    chosen = k.BLOCKS if S > k.WHOLE else k.LONG_ROWS if S > k.SHORT else k.SHORT_ROWS
    rows = B * H * T

    def run(tile: launch.Tile) -> None:
        whole = {} if chosen is k.BLOCKS else {"BLOCK": launch.power_of_2(S, 16)}
        grid = (-(-rows // tile.meta.get("ROWS", 1)),)
        operands = (scores, alpha.contiguous(), seen, p, rows, H, T, S, n_iter)
        chosen.fn[grid](
            *operands, *scores.stride()[:3], *seen.stride()[:3], HAS_VISIBLE=visible is not None,
            **whole, **tile.meta, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    run(launch.tuner.pick(chosen, (launch.bucket(S), str(scores.dtype)), scores.device, run))
    return p


@entmax_forward.register_fake
def _(scores: Tensor, alpha: Tensor, visible: Tensor | None, n_iter: int) -> Tensor:
    return scores.new_empty(scores.shape)


@torch.library.custom_op("attnzoo::entmax_backward", mutates_args=())
def entmax_backward(g: Tensor, p: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    from attnzoo_kernels.entmax import kernel as k

    B, H, T, S = p.shape
    g, p, alpha = g.contiguous(), p.contiguous(), alpha.contiguous()
    dz = _empty(p, (B, H, T, S), p.dtype)
    dalpha = _empty(p, (B, H, T), torch.float32)

    def run(tile: launch.Tile) -> None:
        k.BACKWARD.fn[(B * H * T,)](
            g, p, alpha, dz, dalpha, H, T, S, **tile.meta, num_warps=tile.warps, num_stages=tile.stages
        )

    run(launch.tuner.pick(k.BACKWARD, (launch.bucket(S), str(p.dtype)), p.device, run))
    return dz, dalpha


@entmax_backward.register_fake
def _(g: Tensor, p: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    return p.new_empty(p.shape), p.new_empty(p.shape[:3], dtype=torch.float32)


def _setup(ctx, inputs, output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])


def _backward(ctx, g: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
    p, alpha = ctx.saved_tensors
    dz, dalpha = entmax_backward(g, p, alpha)
    return dz, dalpha.sum((0, 2)) if ctx.needs_input_grad[1] else None, None, None


entmax_forward.register_autograd(_backward, setup_context=_setup)


def entmax_kernels(scores: Tensor, alpha: Tensor, visible: Tensor | None, n_iter: int) -> Tensor:
    """As the public function; ``alpha (H,)`` in fp32."""
    return entmax_forward(scores, alpha, visible, n_iter)


def worst(device: torch.device) -> tuple[float, float]:
    """Largest error of result and gradients on a small case, and what rounding explains."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 5, 37, generator=draw).to(device) * 2
    weight = torch.randn(2, 3, 5, 37, generator=draw).to(device)
    alpha, visible = torch.tensor([1.2, 1.5, 2.0], device=device), torch.ones(5, 37, device=device).tril(20)
    results = []
    with torch.enable_grad():
        for run in (entmax_kernels, entmax_reference):
            z, a = scores.clone().requires_grad_(), alpha.clone().requires_grad_()
            p = run(z, a, visible.bool()[None, None], 24)
            results.append([p.detach(), *torch.autograd.grad(p, (z, a), weight)])
    error = max((x - y).abs().max().item() for x, y in zip(*results, strict=True))
    return error, 2e-3
