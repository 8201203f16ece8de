"""The front of the selective scan."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.checks import check_choice, check_floats, check_shape
from attnzoo_kernels.selective_scan.reference import selective_scan_reference
from attnzoo_kernels.selective_scan.stepped import selective_scan_stepped


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    segments: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Run N state entries per channel over time (Mamba, arXiv 2312.00752).

        h_t = exp(delta_t A) * h_(t-1) + delta_t u_t B_t        y_t = h_t . C_t

    Args:
        u: (batch,T,channels) inputs.
        delta: (batch,T,channels) step sizes >= 0; 0 keeps the state as it is.
        A: (channels,N) rates < 0.
        B, C: (batch,T,N) how a token writes and reads.
        initial_state: (batch,channels,N); zero by default.
        output_final_state: return the state after the last token too.
        segments: (batch,T) int64 document index of every token, never decreasing; see `attnzoo_kernels.scan`.
            A padded tail carries the last run's index and delta = 0.
        impl: "reference": the plain form in torch. "auto": on a CPU, outside torch.compile, its twin that
            steps through spans which fit the caches; else the plain form.

    Returns:
        y (batch,T,channels) in u's dtype, and h (batch,channels,N) or None. The work is done in fp32, or in
        fp64 if u or the state is, under autocast too; h has that dtype. Training keeps one state per 128
        tokens (16 on a CPU) and computes the others again. First derivatives only.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    check_choice("impl", impl, ("auto", "reference"))
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "initial_state": initial_state}
    check_floats(given, "u")
    if u.dim() != 3:
        raise ValueError(f"u: needs 3 axes (batch, T, channels), got {tuple(u.shape)}; add the missing")
    batch, T, channels = u.shape
    N = A.shape[-1]
    check_shape("delta", delta, (batch, T, channels))
    check_shape("A", A, (channels, N))
    check_shape("B", B, (batch, T, N))
    check_shape("C", C, (batch, T, N))
    check_shape("initial_state", initial_state, (batch, channels, N))
    if segments is not None and (segments.dtype != torch.int64 or segments.shape != (batch, T)):
        raise ValueError(
            f"segments: needs int64 {(batch, T)}, got {segments.dtype} {tuple(segments.shape)}; use .long()"
        )
    double = torch.float64 in (u.dtype, initial_state is not None and initial_state.dtype)
    dtype = torch.float64 if double else torch.float32
    stepped = impl == "auto" and u.is_cpu and not torch.compiler.is_compiling()
    scan = selective_scan_stepped if stepped else selective_scan_reference
    with torch.autocast(u.device.type, enabled=False):
        if initial_state is None:
            initial_state = u.new_zeros(batch, channels, N)
        operands = (x.to(dtype) for x in (u, delta, A, B, C, initial_state))
        y, state = scan(*operands, segments)
    return y.to(u.dtype), state if output_final_state else None
