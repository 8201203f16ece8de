"""The front of the scan: one recurrence for linear, gated, delta-rule and rank-1 mixers."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.scan.chunked import scan_chunked
from attnzoo_kernels.scan.reference import scan_quadratic, scan_recurrent, scan_step

FORMS = ("chunked", "recurrent", "quadratic")
LARGEST = 256  # a pass over the states keeps whole columns of them in registers


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    e: Tensor | None = None,
    a: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
    segments: Tensor | None = None,
    form: str = "chunked",
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Run a state S (K,V) per head over time, write k v^T, and read q after the write.

        plain   S_t = D_t S_{t-1} + k_t v_t^T                                     o_t = scale S_t^T q_t
        delta   S_t = D_t S_{t-1} + k_t (beta_t (v_t - (D_t S_{t-1})^T k_t))^T    (with beta)
        rank-1  S_t = D_t S_{t-1} + e_t (a_t^T S_{t-1}) + k_t v_t^T               (with a and e)

    D_t = exp(g_t), a log decay <= 0 (positive values are undefined and not checked).

    Args:
        q, k: (B,T,H,K) queries and keys. Grouped heads are repeated by the caller.
        v: (B,T,H,V) values.
        g: None, (H,) constant, (B,T,H) scalar or (B,T,H,K) diagonal log decay; -inf forgets.
        beta: (B,T,H) write strength of the delta rule.
        e, a: (B,T,H,K) vectors that write and read the rank-1 part.
        scale: factor of the output; K ** -0.5 by default.
        initial_state: (B,H,K,V); zero by default.
        output_final_state: return the state after the last token too.
        chunk_size: largest number of tokens in a chunk of the chunked form; under a gate per channel that
            form has at most K / 2, or 16 where K is small.
        segments: (B,T) int64 document index of every token, never decreasing. Run 0 owns the initial state;
            at the first token of any other run the state is zero. The final state is that of the last
            token's run. A padded tail carries the last run's index, k = v = 0, e = 0, beta = 0 and g = 0:
            with padding, give a constant decay per token.
        form: "chunked"; "recurrent", a loop over tokens; "quadratic", T x T matrices, without e and a.
        impl: "reference", "triton" (form="chunked", K up to 256) or "auto": kernels on a GPU. Their chunks
            have 64, 32 or 16 tokens, whichever is the largest up to ``chunk_size``, and at least 16.

    Returns:
        o (B,T,H,V) in v's dtype, and S (B,H,K,V) or None. The work is done in fp32, or in fp64 if q, k, v or
        the initial state is fp64, under autocast too; S has that dtype. A single token takes one recurrent
        step. The chunked form has first derivatives only.

    Raises:
        ValueError: a shape, dtype, device or combination of arguments is wrong.
    """
    _validate(q, k, v, g, beta, e, a, initial_state, chunk_size, segments, form)
    B, T, H, K = q.shape
    double = torch.float64 in (q.dtype, k.dtype, v.dtype, initial_state is not None and initial_state.dtype)
    dtype = torch.float64 if double else torch.float32
    scale = K**-0.5 if scale is None else scale
    given = (q, k, v, g, beta, e, a, initial_state)
    if launch.choose("scan", impl, *given, refusal=_refusal(form, K)) == "triton":
        o, state = _kernels(q, k, v, g, beta, e, a, scale, initial_state, segments, chunk_size)
        return o, state if output_final_state else None
    with torch.autocast(q.device.type, enabled=False):
        if initial_state is None:
            initial_state = q.new_zeros(B, H, K, v.shape[-1], dtype=dtype)
        state = initial_state.to(dtype)
        if form == "chunked" and T > 1:
            o, state = scan_chunked(q, k, v, g, beta, e, a, scale, state, segments, chunk_size)
        else:
            operands = [None if x is None else x.to(dtype) for x in (q * scale, k, v, g, beta, e, a)]
            o, state = _unchunked(form, operands, state, segments)
    return o.to(v.dtype), state if output_final_state else None


def _refusal(form: str, width: int) -> str | None:
    if form != "chunked":
        return f"the kernels run form='chunked', got {form!r}; use impl='reference'"
    if width > LARGEST:
        return f"the kernels take keys up to {LARGEST} wide, got {width}; use impl='reference'"
    return None


def _kernels(q, k, v, g, beta, e, a, scale, initial_state, segments, chunk_size) -> tuple[Tensor, Tensor]:
    """The Triton kernels; one token without gradients takes a step of its own."""
    from attnzoo_kernels.scan.ops_delta import scan_delta
    from attnzoo_kernels.scan.ops_plain import scan_plain
    from attnzoo_kernels.scan.ops_step import scan_step_kernel
    from attnzoo_kernels.scan.self_check import worst

    launch.self_check("scan", q.device, worst)
    (B, T, H, K), V = q.shape, v.shape[-1]
    if initial_state is None:
        initial_state = q.new_zeros(B, H, K, V, dtype=torch.float32)
    state = initial_state.float()
    if g is not None and g.dim() == 1:
        g = g.expand(B, T, H)
    given = [x for x in (q, k, v, g, beta, e, a, state) if x is not None]
    if T == 1 and not (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        row = (None if x is None else x[:, 0] for x in (q, k, v, g, beta, e, a))
        fresh = None if segments is None else segments[:, 0] != 0
        o, state = scan_step_kernel(state, *row, float(scale), fresh)
        return o.unsqueeze(1), state
    if beta is None and a is None:
        return scan_plain(q, k, v, g, scale, state, segments, chunk_size)
    return scan_delta(q, k, v, g, beta, e, a, scale, state, segments, chunk_size)


def _unchunked(
    form: str, operands: list[Tensor | None], state: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    if form == "quadratic":
        return scan_quadratic(*operands[:5], state, segments)
    if form == "recurrent":
        return scan_recurrent(*operands, state, segments)
    if segments is not None:
        state = torch.where((segments == 0)[..., None, None], state, 0.0)
    o, state = scan_step(state, *(x if x is None or x.dim() == 1 else x[:, 0] for x in operands))
    return o.unsqueeze(1), state


def _validate(q, k, v, g, beta, e, a, initial_state, chunk_size, segments, form) -> None:
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "e": e, "a": a, "initial_state": initial_state}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ValueError(f"{name}: needs a floating-point dtype, got {x.dtype}; convert it first")
    for name, x in (tensors | ({} if segments is None else {"segments": segments})).items():
        if x.device != q.device:
            raise ValueError(f"{name}: needs q's device {q.device}, got {x.device}; move it there")
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q: needs shape (B, T, H, K) without an empty axis, got {tuple(q.shape)}")
    (B, T, H, K), V = q.shape, v.shape[-1]
    legal = {
        "k": [(B, T, H, K)],
        "v": [(B, T, H, V)],
        "g": [(H,), (B, T, H), (B, T, H, K)],
        "beta": [(B, T, H)],
        "e": [(B, T, H, K)],
        "a": [(B, T, H, K)],
        "initial_state": [(B, H, K, V)],
        "segments": [(B, T)],
    }
    if segments is not None:
        tensors["segments"] = segments
        if segments.dtype != torch.int64:
            raise ValueError(f"segments: needs int64 document indices, got {segments.dtype}; use .long()")
    for name, shapes in legal.items():
        if name in tensors and tuple(tensors[name].shape) not in shapes:
            wanted = " or ".join(str(shape) for shape in shapes)
            got = tuple(tensors[name].shape)
            raise ValueError(f"{name}: needs shape {wanted} to go with q {tuple(q.shape)}, got {got}")
    if (e is None) != (a is None):
        given, missing = ("e", "a") if a is None else ("a", "e")
        raise ValueError(f"{missing}: is needed with {given}; give both (rank-1 transition) or neither")
    if beta is not None and a is not None:
        raise ValueError("beta: cannot go with e and a; give beta (delta rule) or e and a (rank-1)")
    if form not in FORMS:
        raise ValueError(f"form: needs one of {', '.join(FORMS)}, got {form!r}")
    if form == "quadratic" and a is not None:
        raise ValueError("form: 'quadratic' has no rank-1 transition (e, a); use 'chunked' or 'recurrent'")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size: needs an integer of at least 1, got {chunk_size!r}")
