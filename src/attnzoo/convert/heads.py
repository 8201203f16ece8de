"""Conversions that let heads share: pooling into groups, fusing into arbitrary groups, sharing over layers.

All matrices act as ``x @ W``; everything runs in fp64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.convert.layer import Layer, heads_of, side_by_side


def pool(W: Tensor, heads: int, groups: int, method: str = "mean", seed: int = 0) -> Tensor:
    """Projections of ``heads`` heads as those of ``groups``: ``(D, heads d)`` -> ``(D, groups d)``.

    Exact where the heads of a group are equal. Biases go as ``(1, heads d)``.

    Args:
        method: "mean" of the group (2305.13245), its "first" head, or "random" N(0, 0.02²).
    """
    blocks = _grouped(W, heads, groups)
    if method == "mean":
        return side_by_side(blocks.mean(1))
    if method == "first":
        return side_by_side(blocks[:, 0])
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return 0.02 * torch.randn(len(W), W.shape[1] * groups // heads, generator=generator, dtype=W.dtype)
    raise ValueError(f"pooling: must be 'mean', 'first', 'random' or 'svd', got {method!r}")


def _grouped(W: Tensor, heads: int, groups: int) -> Tensor:
    """``(D, heads d)`` -> ``(groups, heads / groups, D, d)``."""
    if groups < 1 or heads % groups:
        raise ValueError(f"num_kv_heads: must divide the {heads} key heads of the source, got {groups}")
    return heads_of(W, heads).unflatten(0, (groups, -1))


def grouped(layer: Layer, groups: int, method: str = "mean") -> dict[str, Tensor]:
    """The weights of a `gqa` with ``groups`` key/value heads.

    "svd" factors the values: the group's value heads become one, and what tells them apart goes into the
    output projection; weighted by calibration text where there is some. It is exact for values of rank <= d.
    Keys likewise, into the queries, where nothing rotates them, else by their mean.
    """
    weights, G, named = dict(layer.weights), layer.kv_heads, {}
    keys = "mean" if method == "svd" else method
    if method == "svd":
        named = _shared_values(layer, groups) | (_shared_keys(layer, groups) if layer.theta is None else {})
    for name in "kv":
        if f"W_{name}" in named:
            continue
        weights[f"W_{name}"] = pool(weights[f"W_{name}"], G, groups, keys)
        if f"b_{name}" in weights:
            weights[f"b_{name}"] = pool(weights[f"b_{name}"][None], G, groups, keys)[0]
    return weights | named


def _shared_values(layer: Layer, groups: int) -> dict[str, Tensor]:
    W_v, bases = _one_per_group(layer, "v", groups)
    W_o = layer.weights["W_o"].unflatten(0, (layer.heads, -1))
    return {"W_v": W_v, "W_o": (bases @ W_o).flatten(0, 1)}


def _shared_keys(layer: Layer, groups: int) -> dict[str, Tensor]:
    W_k, bases = _one_per_group(layer, "k", groups)
    return {"W_k": W_k, "W_q": side_by_side(heads_of(layer.weights["W_q"], layer.heads) @ bases.mT)}


def _one_per_group(layer: Layer, name: str, groups: int) -> tuple[Tensor, Tensor]:
    """One key or value head for each group, and for each query head what it was: ``W_h ~ W_g @ basis_h``."""
    G, d = layer.kv_heads, layer.head_dim
    if f"b_{name}" in layer.weights:
        raise ValueError("pooling: svd does not fold biases of keys and values, got some; use mean")
    made, bases = [], []
    for group in _grouped(layer.weights[f"W_{name}"], G, groups):
        stacked = side_by_side(group)  # (D, t d)
        seen = stacked if layer.x is None else layer.inputs().flatten(0, 1) @ stacked
        basis = torch.linalg.svd(seen, full_matrices=False)[2][:d]  # (d, t d)
        made.append(stacked @ basis.T)
        bases += basis.unflatten(1, (len(group), d)).transpose(0, 1)
    return side_by_side(torch.stack(made)), torch.stack(bases).repeat_interleave(layer.heads // G, 0)


class Fused(NamedTuple):
    """One layer of `dha`: its weights, and which key and value head each query head reads."""

    weights: dict[str, Tensor]
    key_map: list[int]
    value_map: list[int]


def fuse(layers: list[Layer], budget: int) -> list[Fused]:
    """MHA to DHA (2406.06567): keys and values in groups of their own, with budgets found over all layers.

    Every key and value head, scaled by its layer's matrix, is a point; the merge that costs least by Ward's
    criterion comes first, anywhere, until ``budget`` key and value heads are left in all. A group's head is
    the mean of its members.

    Raises:
        ValueError: the budget is not between one head of each kind per layer and all there are.
    """
    most = sum(2 * layer.kv_heads for layer in layers)
    if not 2 * len(layers) <= budget <= most:
        raise ValueError(f"budget: must be in {2 * len(layers)}..{most} heads, got {budget}")
    points = {
        (i, name): heads_of(layer.weights[f"W_{name}"], layer.kv_heads).flatten(1)
        for i, layer in enumerate(layers)
        for name in "kv"
    }
    grams = {key: z @ z.T / z.square().sum() for key, z in points.items()}
    groups = {key: [[h] for h in range(len(z))] for key, z in points.items()}
    cheapest = {key: _cheapest(grams[key], own) for key, own in groups.items()}
    for _ in range(most - budget):
        key = min(cheapest, key=cheapest.get)
        _, a, b = cheapest[key]
        groups[key][a] += groups[key].pop(b)
        cheapest[key] = _cheapest(grams[key], groups[key])
    return [_collapse(layer, *(sorted(groups[i, n]) for n in "kv")) for i, layer in enumerate(layers)]


def _cheapest(gram: Tensor, groups: list[list[int]]) -> tuple[float, int, int]:
    """The two groups whose squared distances to their mean grow least when they become one, and how much.

    Args:
        gram: products of all points with each other.
    """
    n = len(groups)
    if n == 1:
        return torch.inf, 0, 0
    member = torch.zeros(n, len(gram), dtype=gram.dtype)
    for row, own in zip(member, groups, strict=True):
        row[own] = 1 / len(own)
    means = member @ gram @ member.T
    size = torch.tensor([len(own) for own in groups], dtype=gram.dtype)
    apart = means.diagonal()[:, None] + means.diagonal() - 2 * means
    growth = apart * size[:, None] * size / (size[:, None] + size)
    growth[torch.ones(n, n, dtype=torch.bool).tril()] = torch.inf
    least = int(growth.argmin())
    return float(growth.flatten()[least]), least // n, least % n


def _collapse(layer: Layer, keys: list[list[int]], values: list[list[int]]) -> Fused:
    weights, maps, share = dict(layer.weights), [], layer.heads // layer.kv_heads
    for name, groups in (("k", keys), ("v", values)):
        for kind in ("W", "b"):
            symbol = f"{kind}_{name}"
            if symbol in weights:
                flat = weights[symbol].reshape(-1, layer.kv_heads * layer.head_dim)
                blocks = heads_of(flat, layer.kv_heads)
                fused = side_by_side(torch.stack([blocks[sorted(group)].mean(0) for group in groups]))
                weights[symbol] = fused if kind == "W" else fused[0]
        home = {h: g for g, group in enumerate(groups) for h in group}
        maps.append([home[h // share] for h in range(layer.heads)])
    return Fused(weights, *maps)


def repeated(layer: Layer) -> dict[str, Tensor]:
    """The weights with a key and a value head for each query head."""
    share, weights = layer.heads // layer.kv_heads, dict(layer.weights)
    for symbol in ("W_k", "W_v", "b_k", "b_v"):
        if symbol in weights:
            blocks = weights[symbol].unflatten(-1, (layer.kv_heads, -1))
            weights[symbol] = blocks.repeat_interleave(share, dim=-2).flatten(-2)
    return weights


def nearest_heads(layers: list[Layer], rate: float) -> list[list[list[int]]]:
    """DirectShare (2402.11819): which head ``[layer, head]`` takes the blocks of which earlier one.

    Heads are matched by the cosine of their query and key blocks, the best ``rate`` of all heads are
    replaced, and each takes what its match itself takes. Heads of a group go together.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"share_rate: must be in 0..1, got {rate}")
    share = layers[0].heads // layers[0].kv_heads
    blocks = []
    for layer in layers:
        q = heads_of(layer.weights["W_q"], layer.heads).flatten(1).unflatten(0, (-1, share)).flatten(1)
        k = heads_of(layer.weights["W_k"], layer.kv_heads).flatten(1)
        blocks.append(torch.nn.functional.normalize(torch.cat([q, k], dim=1), dim=1))
    found, G = [], layers[0].kv_heads
    for i in range(1, len(layers)):
        score = blocks[i] @ torch.cat(blocks[:i]).T  # (G, i G)
        best, where = score.max(1)
        found += [(float(best[g]), (i, g), divmod(int(where[g]), G)) for g in range(G)]
    chosen = sorted(found, reverse=True)[: round(rate * len(layers) * G)]
    roots = {own: source for _, own, source in chosen}

    def root(place: tuple[int, int]) -> tuple[int, int]:
        return root(roots[place]) if place in roots else place

    return [
        [[own[0], own[1] * share + r], [root(own)[0], root(own)[1] * share + r]]
        for own in sorted(roots)
        for r in range(share)
    ]


def share_penalty(layers: list[Layer], table: list[list[list[int]]]) -> Tensor:
    """PostShare (2402.11819): how far the heads of ``table`` are from their sources, the mean over them of
    |dW_q| + |dW_k| + |dW_v|. The paper trains on half the loss and half of this, then shares.

    Args:
        layers: as `read` gives them of a model in training, so that gradients reach its weights.
    """
    counts = {"W_q": layers[0].heads, "W_k": layers[0].kv_heads, "W_v": layers[0].kv_heads}
    blocks = [{s: heads_of(layer.weights[s], n) for s, n in counts.items()} for layer in layers]
    gaps = [
        torch.linalg.norm(blocks[i][s][h * n // layers[0].heads] - blocks[j][s][g * n // layers[0].heads])
        for (i, h), (j, g) in table
        for s, n in counts.items()
    ]
    return torch.stack(gaps).sum() / len(table)


def replaced(layers: list[Layer], table: list[list[list[int]]]) -> list[dict[str, Tensor]]:
    """The layers' weights after every head of ``table`` took the blocks of its source."""
    share = layers[0].heads // layers[0].kv_heads
    blocks = [
        {
            "W_q": heads_of(layer.weights["W_q"], layer.heads),
            "W_k": heads_of(layer.weights["W_k"], layer.kv_heads),
            "W_v": heads_of(layer.weights["W_v"], layer.kv_heads),
            "W_o": layer.weights["W_o"].unflatten(0, (layer.heads, -1)),
        }
        for layer in layers
    ]
    blocks = [{name: z.clone() for name, z in own.items()} for own in blocks]
    for (i, h), (root, source) in table:
        for name, own in blocks[i].items():
            step = share if name in ("W_k", "W_v") else 1
            own[h // step] = blocks[root][name][source // step]
    return [
        layer.weights | {n: z.flatten(0, 1) if n == "W_o" else side_by_side(z) for n, z in own.items()}
        for layer, own in zip(layers, blocks, strict=True)
    ]
