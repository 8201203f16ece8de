"""Gated and delta recurrences from their equations: fp64, one sequence, one head, token by token.

Weights are dicts under the symbols that `golden` reads; ``x`` is ``(T, D)``. The package is not used. Each
variant returns ``(T, D)``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from oracles import Weights, rms, rotate, split


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + (-z).exp())


def silu(z: Tensor) -> Tensor:
    return z * sigmoid(z)


def gelu(z: Tensor) -> Tensor:
    return z * (1 + torch.erf(z / math.sqrt(2))) / 2


def softplus(z: Tensor) -> Tensor:
    return torch.log1p(z.exp())


def conv(z: Tensor, taps: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    n, T = taps.shape[1], len(z)
    rows = []
    for t in range(T):
        rows.append(sum(taps[:, m] * z[t - n + 1 + m] for m in range(n) if t - n + 1 + m >= 0) + bias)
    return torch.stack(rows)


def unit(z: Tensor) -> Tensor:
    return z / (z.pow(2).sum(1, keepdim=True) + 1e-6).sqrt()


def scanned(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, beta: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """One head: forget by exp(g), write (or, with beta, overwrite), read; g ``(T,)`` or ``(T, d_k)``."""
    S, outs = torch.zeros(k.shape[1], v.shape[1]).double(), []
    for t in range(len(q)):
        if g is not None:
            S = g[t].exp().reshape(-1, 1) * S
        new = v[t] if beta is None else beta[t] * (v[t] - S.T @ k[t])
        S = S + torch.outer(k[t], new)
        outs.append(scale * S.T @ q[t])
    return torch.stack(outs)


def heads_of(x: Tensor, w: Weights, name: str, heads: int, groups: int | None = None) -> list[Tensor]:
    """Head h of a projection whose ``groups`` heads are shared by consecutive ones."""
    parts = split(x @ w[f"W_{name}"], groups or heads)
    return [parts[h * len(parts) // heads] for h in range(heads)]


def deltanet(x: Tensor, w: Weights, o: dict[str, Any]) -> Tensor:
    H, G = o["num_heads"], o.get("num_kv_heads", o["num_heads"])
    act = {
        "silu": silu,
        "relu": lambda z: z.clamp(min=0),
        "elu": lambda z: torch.where(z > 0, z + 1, z.exp()),
        "identity": lambda z: z,
    }[o.get("qk_activation", "silu")]
    streams = {}
    for name, fn in (("q", act), ("k", act), ("v", silu)):
        z = x @ w[f"W_{name}"]
        streams[name] = fn(conv(z, w[f"conv_{name}"]) if f"conv_{name}" in w else z)
    norm = unit if o.get("key_norm", "l2") == "l2" else lambda z: z / z.sum(1, keepdim=True)
    top = 2.0 if o.get("allow_neg_eigval") else 1.0
    beta = top * (sigmoid(x @ w["W_beta"]) if "W_beta" in w else torch.ones(len(x), H).double())
    outs = []
    for h in range(H):
        q, k, v = split(streams["q"], H)[h], split(streams["k"], G)[h * G // H], split(streams["v"], G)
        y = scanned(norm(q), norm(k), v[h * G // H], None, beta[:, h], q.shape[1] ** -0.5)
        y = rms(y, w["gamma_o"], 1e-5)
        outs.append(y * silu(split(x @ w["W_g"], H)[h]) if "W_g" in w else y)
    return torch.cat(outs, dim=1) @ w["W_o"]


def retnet(x: Tensor, w: Weights, o: dict[str, Any]) -> Tensor:
    H, G = o["num_heads"], o.get("num_kv_heads")
    q, k, v, gate = heads_of(x, w, "q", H), *(heads_of(x, w, n, H, G) for n in "kv"), split(x @ w["W_g"], H)
    outs = []
    for h in range(H):
        g = torch.full((len(x),), math.log(1 - 2.0 ** (-5 - h)), dtype=x.dtype)
        y = scanned(rotate(q[h], 10000.0), rotate(k[h], 10000.0), v[h], g, None, q[h].shape[1] ** -0.5)
        if o.get("torchscale_norm"):
            qh, kh, d = rotate(q[h], 10000.0), rotate(k[h], 10000.0), q[h].shape[1]
            for t in range(len(x)):
                row = torch.tensor([(1 - 2.0 ** (-5 - h)) ** (t - j) for j in range(t + 1)], dtype=x.dtype)
                scores = kh[: t + 1] @ qh[t] * d**-0.5 * row / row.sum().sqrt()
                y[t] = y[t] / row.sum().sqrt() / scores.sum().abs().clamp(min=1)
        act = silu if o.get("gate_fn", "silu") == "silu" else gelu
        outs.append(rms(y, w.get("gamma_o", 1.0), o.get("norm_eps", 1e-5)) * act(gate[h]))
    return torch.cat(outs, dim=1) @ w["W_o"]


def lightning_attention(x: Tensor, w: Weights, o: dict[str, Any]) -> Tensor:
    H, layer, depth = o["num_heads"], o.get("layer_idx", 0), o.get("num_layers", 1)
    d, outs = x.shape[1] // H, []
    for h in range(H):
        if "W_qkv" in w:
            q, k, v = silu(split(x @ w["W_qkv"], H)[h]).split(d, dim=1)
        else:
            q, k, v = (silu(heads_of(x, w, n, H)[h]) for n in "qkv")
        slope = 2 ** (-8 * (h + 1) / H) * (1 - layer / (depth - 1 + 1e-5) + 1e-5)
        outs.append(scanned(q, k, v, torch.full((len(x),), -slope, dtype=x.dtype)))
    return (rms(torch.cat(outs, dim=1), w["gamma_o"], 1e-6) * sigmoid(x @ w["W_g"])) @ w["W_o"]


def gla(x: Tensor, w: Weights, o: dict[str, Any]) -> Tensor:
    H, G = o["num_heads"], o.get("num_kv_heads", o["num_heads"])
    g = -softplus(-(x @ w["W_1"] @ w["W_2"] + w["b"])) / o.get("gate_logit_normalizer", 16)
    g = g.clamp(min=o.get("clamp_min") or -math.inf)
    streams, outs = {n: x @ w[f"W_{n}"] for n in "qkv"}, []
    if "conv_q" in w:
        streams = {n: silu(conv(z, w[f"conv_{n}"])) for n, z in streams.items()}
    for h in range(H):
        i, q = h * G // H, split(streams["q"], H)[h]
        k, v, decay = split(streams["k"], G)[i], split(streams["v"], G)[i], split(g, G)[i]
        y = rms(scanned(q, k, v, decay, None, q.shape[1] ** -0.5), w["gamma_o"], 1e-5)
        outs.append(y * silu(split(x @ w["W_g"], H)[h]))
    return torch.cat(outs, dim=1) @ w["W_o"]


def kda(x: Tensor, w: Weights, o: dict[str, Any]) -> Tensor:
    H, H_v = o["num_heads"], o.get("num_v_heads", o["num_heads"])
    streams = {n: x @ w[f"W_{n}"] for n in "qkv"}
    streams = {n: silu(conv(z, w[f"conv_{n}"]) if f"conv_{n}" in w else z) for n, z in streams.items()}
    raw = split(x @ w["F_1"] @ w["F_2"] + w["dt_bias"], H_v)
    beta = (2.0 if o.get("allow_neg_eigval") else 1.0) * sigmoid(x @ w["W_beta"])
    gate, outs = split(x @ w["G_1"] @ w["G_2"] + w.get("b", 0.0), H_v), []
    for h in range(H_v):
        q, k = (unit(split(streams[n], H)[h * H // H_v]) for n in "qk")
        rate = w["A_log"][h].exp()
        if o.get("safe_gate"):
            g = o.get("lower_bound", -5.0) * sigmoid(rate * raw[h])
        else:
            g = -rate * softplus(raw[h])
        y = scanned(q, k, split(streams["v"], H_v)[h], g, beta[:, h], q.shape[1] ** -0.5)
        outs.append(rms(y, w["gamma_o"], 1e-5) * sigmoid(gate[h]))
    return torch.cat(outs, dim=1) @ w["W_o"]


def hgrn2(x: Tensor, w: Weights, o: dict[str, Any]) -> Tensor:
    D, layer = x.shape[1], o.get("layer_idx", 0)
    H = D // o["expand_ratio"] if "expand_ratio" in o else o["num_heads"]
    streams = {n: x @ w[f"W_{n}"] for n in "qfi"}
    for name, ours in (("q", "q"), ("f", "k"), ("i", "v")):
        if "conv_q" in w:
            streams[name] = conv(streams[name], w[f"conv_{ours}"])
    low = torch.zeros(D).double()
    if "Gamma" in w:
        share = w["Gamma"].exp() / w["Gamma"].exp().sum(0)
        low = share[: layer + 1].sum(0) - share[0]
    f, outs = low + (1 - low) * sigmoid(streams["f"]), []
    for h in range(H):
        q, decay, v = silu(split(streams["q"], H)[h]), split(f, H)[h], split(streams["i"], H)[h]
        outs.append(scanned(q, 1 - decay, v, decay.log(), None, q.shape[1] ** -0.5))
    return rms(torch.cat(outs, dim=1), w["gamma_o"], 1e-5) @ w["W_o"]


def ssm_streams(x: Tensor, w: Weights, o: dict[str, Any]) -> tuple[Tensor, ...]:
    """z, x, B, C, step and log decay of Mamba-2."""
    N, G, H = o["state_size"], o.get("n_groups", 1), len(w["A_log"])
    inner = w["W_out"].shape[0]
    z, xbc, dt = (x @ w["W_in"] + w.get("b_in", 0.0)).split([inner, inner + 2 * G * N, H], dim=1)
    taps = torch.cat([w[f"conv_{n}"] for n in "vkq"])
    bias = torch.cat([w[f"conv_{n}_bias"] for n in "vkq"])
    u, B, C = silu(conv(xbc, taps, bias)).split([inner, G * N, G * N], dim=1)
    step = softplus(dt + w["dt_bias"]).clamp(*o.get("dt_limit", (0.0, math.inf)))
    return z, u, B, C, step, -w["A_log"].exp() * step


def ssm_out(outs: list[Tensor], u: Tensor, z: Tensor, w: Weights, groups: int) -> Tensor:
    H = len(outs)
    y = torch.cat(
        [y + w["D"][h] * part for h, (y, part) in enumerate(zip(outs, split(u, H), strict=True))], 1
    )
    y = torch.cat([rms(part, 1.0, 1e-5) for part in split(y * silu(z), groups)], dim=1)
    return (y * w["gamma_o"]) @ w["W_out"]


def mamba2(x: Tensor, w: Weights, o: dict[str, Any]) -> Tensor:
    z, u, B, C, step, g = ssm_streams(x, w, o)
    H, G = len(w["A_log"]), o.get("n_groups", 1)
    outs = []
    for h in range(H):
        k, q = split(B, G)[h * G // H], split(C, G)[h * G // H]
        outs.append(scanned(q, k, step[:, h : h + 1] * split(u, H)[h], g[:, h]))
    return ssm_out(outs, u, z, w, G)


def rwkv7(x: Tensor, w: Weights, o: dict[str, Any], v_first: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``y`` and the values, which are v_first at layer 0."""
    H, T = o["num_heads"], len(x)
    last = torch.cat([torch.zeros(1, x.shape[1]).double(), x[:-1]])
    mixed = {c: x + w[f"mu_{c}"] * (last - x) for c in "rwkvag"}
    r, k, v = (mixed[c] @ w[f"W_{c}"] for c in "rkv")
    decay = (-math.exp(-0.5) * sigmoid(w["w0"] + torch.tanh(mixed["w"] @ w["W_w1"]) @ w["W_w2"])).exp()
    a = sigmoid(w["a0"] + mixed["a"] @ w["W_a1"] @ w["W_a2"])
    gate = sigmoid(mixed["g"] @ w["W_g1"]) @ w["W_g2"]
    if v_first is not None:
        v = v + (v_first - v) * sigmoid(w["v0"] + mixed["v"] @ w["W_v1"] @ w["W_v2"])
    kappa, key, outs = k * w["k_k"], k * (1 + (a - 1) * w["k_a"]), []
    for h in range(H):
        parts = [split(z, H)[h] for z in (r, key, v, decay, a, kappa)]
        rh, kh, vh, dh, ah, ch = parts
        S, d = torch.zeros(rh.shape[1], vh.shape[1]).double(), rh.shape[1]
        gain, bias = split(w["gn_w"][None], H)[h][0], split(w["gn_b"][None], H)[h][0]
        rows = []
        for t in range(T):
            c = ch[t] / ch[t].norm()
            S = dh[t][:, None] * S - torch.outer(c * ah[t], S.T @ c) + torch.outer(kh[t], vh[t])
            y = S.T @ rh[t]
            y = (y - y.mean()) / ((y - y.mean()).pow(2).mean() + o.get("gn_eps", d * 1e-5)).sqrt()
            rows.append(y * gain + bias + (rh[t] * kh[t] * w["r_k"][h]).sum() * vh[t])
        outs.append(torch.stack(rows))
    return (torch.cat(outs, dim=1) * gate) @ w["W_o"], v


def level(t: int, j: int) -> int:
    return (t ^ j).bit_length()


def levelled(q: Tensor, k: Tensor, v: Tensor, g: Tensor, lam: Tensor, beta: Tensor | None = None) -> Tensor:
    """One head: what each earlier token wrote, carried to t by the transitions, read with its level."""
    outs, eye = [], torch.eye(k.shape[1]).double()
    for t in range(len(q)):
        o = torch.zeros(v.shape[1]).double()
        for j in range(t + 1):
            write = torch.outer(k[j], v[j] if beta is None else beta[j] * v[j])
            for s in range(j + 1, t + 1):
                A = eye if beta is None else eye - beta[s] * torch.outer(k[s], k[s])
                write = A @ (g[s].exp() * write)
            o = o + lam[t, level(t, j)] * write.T @ q[t]
        outs.append(o)
    return torch.stack(outs)


def log_linear(x: Tensor, w: Weights, o: dict[str, Any]) -> Tensor:
    H = len(w["A_log"])
    lam = (x @ w["W_lambda"] + w.get("b_lambda", 0.0)).unflatten(1, (H, -1))
    lam = softplus(w["Lambda"] * lam)
    if o.get("base") != "gated_deltanet":
        z, u, B, C, step, g = ssm_streams(x, w, o)
        G, outs = o.get("n_groups", 1), []
        for h in range(H):
            k, q = split(B, G)[h * G // H], split(C, G)[h * G // H]
            outs.append(levelled(q, k, step[:, h : h + 1] * split(u, H)[h], g[:, h], lam[:, h]))
        return ssm_out(outs, u, z, w, G)
    G, outs = o["num_heads"], []
    streams = {n: silu(conv(x @ w[f"W_{n}"], w[f"conv_{n}"])) for n in "qkv"}
    g, beta = -w["A_log"].exp() * softplus(x @ w["W_a"] + w["dt_bias"]), sigmoid(x @ w["W_beta"])
    for h in range(H):
        q, k = (unit(split(streams[n], G)[h * G // H]) for n in "qk")
        y = levelled(q, k, split(streams["v"], H)[h], g[:, h], lam[:, h], beta[:, h])
        outs.append(rms(y, w["gamma_o"], 1e-5) * silu(split(x @ w["W_g"], H)[h]))
    return torch.cat(outs, dim=1) @ w["W_o"]
