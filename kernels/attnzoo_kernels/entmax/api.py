"""The front of alpha-entmax."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.checks import check_floats, check_shape
from attnzoo_kernels.entmax.reference import entmax_reference


def entmax(
    scores: Tensor,
    alpha: Tensor | float,
    visible: Tensor | None = None,
    *,
    n_iter: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """alpha-entmax over the last axis: p_j = [(alpha - 1) z_j - tau]_+^(1 / (alpha - 1)) with sum p = 1.

    arXiv 1905.05702, 1909.00015. alpha = 2 is sparsemax; alpha -> 1 tends to softmax.

    Args:
        scores: (B,H,T,S).
        alpha: (H,) floating-point tensor or a number, meant for 1.01 to 2: above 1 and at most 2, with ever
            fewer exact digits below 1.01. Values outside give NaN where they lie on a GPU, whose values are
            not read here, and an error elsewhere.
        visible: (B or 1, 1 or H, T, S) bool; None = all.
        n_iter: halvings of the interval that holds tau; 24 by default, 50 in fp64.
        impl: "triton", "reference" or "auto".

    Returns:
        p (B,H,T,S) in scores' dtype, computed in fp32 (fp64 for fp64): exactly 0 outside the support and
        where not visible, all 0 in rows that see nothing. First derivatives by scores and alpha.

    Raises:
        ValueError: a shape, dtype, device or value is wrong.
    """
    _validate(scores, alpha, visible, n_iter)
    double = scores.dtype == torch.float64
    n_iter = n_iter or (50 if double else 24)
    dtype = torch.float64 if double else torch.float32
    alpha = _per_head(alpha, scores).to(dtype)
    if launch.choose("entmax", impl, scores) == "reference":
        return entmax_reference(scores, alpha, visible, n_iter)
    from attnzoo_kernels.entmax.ops import entmax_kernels, worst

    launch.self_check("entmax", scores.device, worst)
    return entmax_kernels(scores, alpha, visible, n_iter)


def _per_head(alpha: Tensor | float, scores: Tensor) -> Tensor:
    if not isinstance(alpha, Tensor):
        return scores.new_full((scores.shape[1],), float(alpha), dtype=torch.float64)
    if alpha.is_cuda or torch.compiler.is_compiling():
        return torch.where((alpha > 1) & (alpha <= 2), alpha, torch.nan)
    return alpha


def _validate(scores: Tensor, alpha: Tensor | float, visible: Tensor | None, n_iter: int | None) -> None:
    if scores.dim() != 4:
        raise ValueError(f"scores: needs shape (B, H, T, S), got {tuple(scores.shape)}; add the missing axes")
    check_shape("scores", scores, tuple(scores.shape))
    check_floats({"scores": scores, "alpha": alpha if isinstance(alpha, Tensor) else None}, "scores")
    B, H, T, S = scores.shape
    if isinstance(alpha, Tensor):
        check_shape("alpha", alpha, (H,))
        values = [] if alpha.is_cuda or torch.compiler.is_compiling() else alpha.tolist()
    else:
        values = [alpha]
    for value in values:
        if not 1 < value <= 2:
            raise ValueError(f"alpha: needs to be above 1 and at most 2, got {value}; clamp it (1.01 to 2)")
    if visible is not None:
        if visible.dtype != torch.bool:
            raise ValueError(f"visible: needs dtype bool, got {visible.dtype}; compare it with 0 first")
        if visible.device != scores.device:
            raise ValueError(
                f"visible: needs scores' device {scores.device}, got {visible.device}; move it there"
            )
        check_shape("visible", visible, *((b, h, T, S) for b in (B, 1) for h in (H, 1)))
    if n_iter is not None and (isinstance(n_iter, bool) or not isinstance(n_iter, int) or n_iter < 1):
        raise ValueError(f"n_iter: needs an integer of at least 1, got {n_iter!r}; None takes 24, 50 in fp64")
