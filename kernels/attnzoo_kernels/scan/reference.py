"""The scan in its two plain forms: token by token, and as T x T matrices. Slow, and easy to check by eye.

Axis letters: B batch, T time, S source time, H heads, K key width d_k, V value width d_v.
Inputs have been validated and the scale, the working precision and the initial state settled by `api.scan`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scan_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    e: Tensor | None,
    a: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Advance the state (B,H,K,V) by one token and read it.

    Shape: q, k, e, a (B,H,K); v (B,H,V); g (B,H), (B,H,K) or (H,); beta (B,H) -> o (B,H,V), state (B,H,K,V).
    """
    k, v, q = k.unsqueeze(-1), v.unsqueeze(-2), q.unsqueeze(-2)
    erased = None if a is None else a.unsqueeze(-2) @ state  # the rank-1 part reads the undecayed state
    if g is not None:
        state = state * (g.exp().unsqueeze(-1) if g.dim() == 3 else g.exp()[..., None, None])
    if erased is not None:
        state = state + e.unsqueeze(-1) @ erased
    if beta is not None:
        v = (v - k.mT @ state) * beta[..., None, None]
    state = state + k @ v
    return (q @ state).squeeze(-2), state


def scan_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    e: Tensor | None,
    a: Tensor | None,
    state: Tensor,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loop over the tokens from `state` (B,H,K,V); returns o (B,T,H,V) and the last state."""
    assert g is None or bool((g <= 0).all()), "the scan is defined for log decays g <= 0"
    assert segments is None or bool((segments.diff(dim=1) >= 0).all()), "segments must not decrease"

    def at(x: Tensor | None, t: int) -> Tensor | None:
        return x if x is None or x.dim() == 1 else x[:, t]

    outputs = []
    for t in range(q.shape[1]):
        if segments is not None:
            before = segments[:, t - 1] if t else torch.zeros_like(segments[:, 0])
            state = torch.where((segments[:, t] == before)[:, None, None, None], state, 0.0)
        o, state = scan_step(state, *(at(x, t) for x in (q, k, v, g, beta, e, a)))
        outputs.append(o)
    return torch.stack(outputs, 1), state


def scan_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Whole-sequence matrix form of the scalar, diagonal and delta classes; memory B*T*T*H*K.

    O = P V with P = tril(M_qk) (I + tril(beta M_kk, -1))^-1 beta, and P = tril(M_qk) without beta.
    """
    T = q.shape[1]
    if segments is None:
        segments = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
    if g is None:
        g = torch.zeros_like(q[..., 0])
    if g.dim() == 1:
        g = g.expand(q.shape[:3])
    sums = (g if g.dim() == 4 else g.unsqueeze(-1)).expand_as(q).cumsum(1)  # B,T,H,K
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    visible = causal & (segments[:, :, None] == segments[:, None, :])  # B,T,S
    decay = sums[:, :, None] - sums[:, None]  # B,T,S,H,K
    decay = decay.masked_fill(~visible[..., None, None], float("-inf")).exp()
    inside = (segments == 0)[..., None, None]  # the tokens that may read the initial state
    carried = torch.where(inside, sums, float("-inf")).exp()  # B,T,H,K

    if beta is not None:
        error = v - torch.einsum("bthk,bhkv->bthv", k * carried, state)
        overlap = torch.einsum("bthk,bshk,btshk->bhts", k, k, decay) * beta.mT.unsqueeze(-1)
        matrix = overlap.tril(-1) + torch.eye(T, dtype=q.dtype, device=q.device)
        right = (error * beta.unsqueeze(-1)).transpose(1, 2)  # B,H,T,V
        v = torch.linalg.solve_triangular(matrix, right, upper=False).transpose(1, 2)
    scores = torch.einsum("bthk,bshk,btshk->bhts", q, k, decay)
    o = torch.einsum("bhts,bshv->bthv", scores, v) + torch.einsum("bthk,bhkv->bthv", q * carried, state)
    last = torch.einsum("bshk,bshv->bhkv", k * decay[:, -1], v) + carried[:, -1].unsqueeze(-1) * state
    return o, last
