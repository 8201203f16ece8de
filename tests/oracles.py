"""The first ten variants from their equations alone: fp64, one sequence, loops instead of tricks.

Weights are dicts under the symbols that `golden` reads; ``x`` is ``(T, D)``. The package is not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Maps = Callable[[str, Tensor], Tensor]


def rotate(z: Tensor, theta: float | None) -> Tensor:
    """RoPE on ``(T, r)``: the pair (f, f + r/2) as a complex number, turned by ``t theta^(-2f/r)``."""
    if theta is None:
        return z
    T, r = z.shape
    turn = torch.tensor([[t * theta ** (-2 * f / r) for f in range(r // 2)] for t in range(T)], dtype=z.dtype)
    pair = torch.complex(z[:, : r // 2], z[:, r // 2 :]) * torch.polar(torch.ones_like(turn), turn)
    return torch.cat([pair.real, pair.imag], dim=1)


def rms(z: Tensor, gain: Tensor | float = 1.0, eps: float = 1e-6) -> Tensor:
    return z / (z.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


def split(z: Tensor, heads: int) -> list[Tensor]:
    """``(T, heads * d)`` -> one ``(T, d)`` per head."""
    return list(z.chunk(heads, dim=1))


def project(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"W_{name}"] + w.get(f"b_{name}", 0.0)


def out(o: Tensor, w: Weights) -> Tensor:
    return project(o.flatten(1), w, "o")


def causal(T: int, window: int | None = None, sinks: int = 0) -> Tensor:
    seen = torch.zeros(T, T, dtype=torch.bool)
    for i in range(T):
        for j in range(i + 1):
            seen[i, j] = window is None or i - j < window or j < sinks
    return seen


def softmax_rows(s: Tensor, seen: Tensor) -> Tensor:
    p = torch.zeros_like(s)
    for i in range(len(s)):
        e = (s[i, seen[i]] - s[i, seen[i]].max()).exp()
        p[i, seen[i]] = e / e.sum()
    return p


def attend(
    q: list[Tensor], k: list[Tensor], v: list[Tensor], seen: Tensor, compose: Maps | None = None
) -> Tensor:
    """``(T, H, d_v)``; query head h reads key and value head ``h G // H``."""
    H, G = len(q), len(k)
    scores = torch.stack([q[h] @ k[h * G // H].T / math.sqrt(q[h].shape[1]) for h in range(H)])
    if compose:
        scores = compose("pre", scores)
    p = torch.stack([softmax_rows(s, seen) for s in scores])
    if compose:
        p = compose("post", p) * seen
    return torch.stack([p[h] @ v[h * G // H] for h in range(H)], dim=1)


def host(
    x: Tensor,
    w: Weights,
    heads: int,
    kv_heads: int | None = None,
    theta: float | None = 10000.0,
    window: int | None = None,
    sinks: int = 0,
    knock: Callable | None = None,
    compose: Maps | None = None,
) -> Tensor:
    """Per-head outputs ``(T, H, d)`` of mha, gqa, mqa, sliding_window, kha and dcmha."""
    G = kv_heads or heads
    q, k, v = split(project(x, w, "q"), heads), split(project(x, w, "k"), G), split(project(x, w, "v"), G)
    if knock:
        q, k, v = ([knock(name, z) for z in zs] for name, zs in (("q", q), ("k", k), ("v", v)))
    if "gamma_q" in w:
        q, k = [rms(z, w["gamma_q"]) for z in q], [rms(z, w["gamma_k"]) for z in k]
    q, k = [rotate(z, theta) for z in q], [rotate(z, theta) for z in k]
    return attend(q, k, v, causal(len(x), window, sinks), compose)


def mla(x: Tensor, w: Weights, heads: int, d_n: int, d_r: int, norm: bool = True) -> Tensor:
    """Materialised keys and values; ``d_r`` = 0 means no position."""
    normed = rms if norm else lambda z, gain: z
    c_q = normed(x @ w["W_dq"], w.get("gamma_q")) if "W_dq" in w else x
    queries = split(c_q @ w["W_uq" if "W_dq" in w else "W_q"], heads)
    down = x @ w["W_dkv"]
    rank = down.shape[1] - d_r
    up = split(normed(down[:, :rank], w.get("gamma_kv")) @ w["W_ukv"], heads)
    theta = 10000.0 if d_r else None
    q = [torch.cat([z[:, :d_n], rotate(z[:, d_n:], theta)], dim=1) for z in queries]
    k = [torch.cat([z[:, :d_n], rotate(down[:, rank:], theta)], dim=1) for z in up]
    return attend(q, k, [z[:, d_n:] for z in up], causal(len(x)))


def knocked(w: Weights, kind: str, targets: str) -> Callable:
    """The shared map of kha."""

    def knock(name: str, z: Tensor) -> Tensor:
        if name not in targets:
            return z
        if kind == "linear":
            return z @ w[f"T_{name.upper()}"]
        gate = 2 * torch.sigmoid(z @ w["W_gate"])
        return z * gate if kind == "gate" else (z @ w["W_up"] * gate) @ w["W_down"]

    return knock


def composer(
    x: Tensor, w: Weights, heads: int, rank: int, sides: tuple[str, ...], stages: tuple[str, ...]
) -> Maps:
    """Compose of dcmha by the explicit H x H matrix of each pair of tokens."""
    eye, order = torch.eye(heads).double(), [(s, side) for s in ("pre", "post") for side in ("query", "key")]

    def token_matrix(c: int, t: int) -> Tensor:
        u = torch.nn.functional.gelu(x[t] @ w["W1"][:, c])
        both = torch.einsum("k,krh->rh", u, w["Q"][c])
        return rms(both[:rank]).T @ both[rank:] + torch.diag(torch.tanh(x[t] @ w["W_d"][:, c]))

    def compose(stage: str, a: Tensor) -> Tensor:
        if stage not in stages:
            return a
        mixed = torch.zeros_like(a)
        for i in range(len(x)):
            for j in range(i + 1):
                m = eye + w.get(f"W_b_{stage}", 0.0)
                for c, (at, side) in enumerate(order):
                    if at == stage and side in sides:
                        m = m + token_matrix(c, i if side == "query" else j)
                mixed[:, i, j] = a[:, i, j] @ m
        return mixed

    return compose


def moh_gate(x: Tensor, w: Weights, heads: int, shared: int, top: int, form: str = "code") -> Tensor:
    """``(T, H)`` gates of the learned router."""
    gates = torch.zeros(len(x), heads).double()
    for t, row in enumerate(x):
        a = (row @ w["W_b"]).softmax(0) if "W_b" in w else torch.ones(2).double()
        c = (row @ w["W_s"]).softmax(0) if "W_s" in w else torch.ones(shared).double()
        kept = torch.zeros(heads - shared).double()
        if heads > shared:
            pi = (row @ w["W_r"]).softmax(0) if "W_r" in w else torch.ones(1).double()
            for e in sorted(range(heads - shared), key=lambda e: -pi[e])[:top]:
                kept[e] = pi[e]
        if form == "code":
            a, c, kept = a * 2 if "W_b" in w else a, c * shared, top * kept / kept.sum() if top else kept
        gates[t] = torch.cat([a[0] * c, a[1] * kept])
    return gates


def qnorm_gate(q: list[Tensor], shared: int, top: int) -> Tensor:
    """``(T, H)`` hard gates from the norms of queries before position, with the gradient of their softmax."""
    gates = []
    for t in range(len(q[0])):
        score = torch.stack([z[t].norm() for z in q[shared:]])
        pi = (score / score.std()).softmax(0)
        hard = torch.zeros_like(pi)
        hard[pi.argsort(descending=True)[:top]] = 1.0
        gates.append(torch.cat([torch.ones(shared).double(), hard + pi - pi.detach()]))
    return torch.stack(gates)


def features(z: Tensor, kind: str, w: Weights, side: str, nu: int = 1) -> Tensor:
    """phi on one head ``(T, d)``."""
    r = torch.cat([z.clamp(min=0), (-z).clamp(min=0)], dim=1)
    if kind == "elu1":
        return torch.where(z > 0, z + 1, z.exp())
    if kind == "relu":
        return z.clamp(min=0)
    if kind == "identity":
        return z
    if kind == "dpfp":
        n = r.shape[1]
        return torch.cat([r * r[:, [(c - j) % n for c in range(n)]] for j in range(1, nu + 1)], dim=1)
    if kind == "t2r":
        return (z @ w[f"W_phi_{side}"]).clamp(min=0)
    if kind == "hadamard":
        return (z @ w[f"W1_{side}"] + w[f"b1_{side}"]) * (z @ w[f"W2_{side}"] + w[f"b2_{side}"])
    y = z @ w[f"W_phi_{side}"] + w[f"b_phi_{side}"]
    e = torch.cat([2 * y, -2 * y], dim=1).exp()
    return e / e.sum(1, keepdim=True)


def linear(
    x: Tensor,
    w: Weights,
    heads: int,
    kv_heads: int | None = None,
    kind: str = "elu1",
    normalize: bool = True,
    theta: float | None = None,
    nu: int = 1,
) -> Tensor:
    """Quadratic kernel attention; positions on the numerator only."""
    G, T = kv_heads or heads, len(x)
    phi_q = [features(z, kind, w, "q", nu) for z in split(project(x, w, "q"), heads)]
    phi_k = [features(z, kind, w, "k", nu) for z in split(project(x, w, "k"), G)]
    v, seen, outs = split(project(x, w, "v"), G), causal(T), []
    for h in range(heads):
        k = phi_k[h * G // heads]
        o = (rotate(phi_q[h], theta) @ rotate(k, theta).T * seen) @ v[h * G // heads]
        if normalize:
            o = o / ((phi_q[h] @ k.T * seen).sum(1, keepdim=True) + 1e-6)
        else:
            o = rms(o * k.shape[1] ** -0.5, w["gamma_o"], 1e-5)
        outs.append(o)
    return torch.stack(outs, dim=1)


def short_conv(z: Tensor, taps: Tensor | None) -> Tensor:
    """Causal depthwise convolution, or nothing, and silu."""
    if taps is not None:
        n = taps.shape[1]
        padded = torch.cat([torch.zeros(n - 1, z.shape[1]).double(), z])
        z = sum(padded[m : m + len(z)] * taps[:, m] for m in range(n))
    return z / (1 + (-z).exp())


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """One head, token by token: decay, overwrite, read; ``(T, d_v)``."""
    S, outs = torch.zeros(k.shape[1], v.shape[1]).double(), []
    for t in range(len(q)):
        S = g[t].exp() * S
        S = S + beta[t] * torch.outer(k[t], v[t] - S.T @ k[t])
        outs.append(S.T @ q[t] / math.sqrt(k.shape[1]))
    return torch.stack(outs)


def gated_deltanet(x: Tensor, w: Weights, heads: int, v_heads: int, top: float = 1.0) -> Tensor:
    """``(T, H_v, d_v)`` before the output projection; gate and beta per value head."""
    q, k = (split(short_conv(x @ w[f"W_{n}"], w.get(f"conv_{n}")), heads) for n in "qk")
    v = split(short_conv(x @ w["W_v"], w.get("conv_v")), v_heads)
    q, k = ([z / (z.pow(2).sum(1, keepdim=True) + 1e-6).sqrt() for z in zs] for zs in (q, k))
    g = -w["A_log"].exp() * torch.log1p((x @ w["W_a"] + w["dt_bias"]).exp())
    beta = top / (1 + (-(x @ w["W_beta"])).exp())
    outs, group = [], v_heads // heads
    for h in range(v_heads):
        o = delta_rule(q[h // group], k[h // group], v[h], g[:, h], beta[:, h])
        o = rms(o, w["gamma_o"], 1e-5)
        if "W_g" in w:
            y = split(x @ w["W_g"], v_heads)[h]
            o = o * y / (1 + (-y).exp())
        outs.append(o)
    return torch.stack(outs, dim=1)
