"""Which heads look at nearby tokens only, so that a recurrent head can take their place."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.convert.layer import Layer, by_head
from attnzoo.convert.model import layers_of
from attnzoo.convert.rope import turn_pairs
from attnzoo.convert.target import PLAIN
from attnzoo.model import LanguageModel


@torch.no_grad()
def recency_heads(
    model: LanguageModel,
    calibration: Tensor,
    *,
    recurrent_fraction: float = 0.5,
    rr_threshold: float | None = None,
    rr_window: int = 64,
) -> list[tuple[int, ...]]:
    """RecurFormer (2410.12850): the heads of each layer with the largest recency ratio, in whole key groups;
    each list is a ``recurrent_heads`` of `recurformer`.

    Our choice, from the stated idea: RR_h is the mean over queries of the weight that the last ``rr_window``
    tokens get; a group has the mean of its heads.

    Args:
        model: of layers with separate queries, keys and values.
        calibration: ``(N, T)`` tokens, T > rr_window.
        recurrent_fraction: share of the heads of a layer, rounded down to whole groups, in [0, 1].
        rr_threshold: takes the groups above it instead, for example 0.9.
        rr_window: w of at least 1, the token itself included.

    Raises:
        ValueError: an option out of range, a text no longer than the window, or a layer of another kind.
    """
    if not 0 <= recurrent_fraction <= 1:
        raise ValueError(f"recurrent_fraction: must be in [0, 1], got {recurrent_fraction}")
    longest = calibration.shape[1] - 1
    if not 1 <= rr_window <= longest:
        raise ValueError(f"rr_window: must be in 1..{longest}, below the text's length, got {rr_window}")
    chosen = []
    for layer in layers_of(model, "recency_heads", PLAIN, calibration):
        size = layer.heads // layer.kv_heads
        ratio = recency_ratio(layer, rr_window).unflatten(0, (-1, size)).mean(1)
        if rr_threshold is None:
            groups = ratio.argsort(descending=True)[: int(recurrent_fraction * len(ratio) + 1e-9)]
        else:
            groups = (ratio > rr_threshold).nonzero()[:, 0]
        chosen.append(tuple(h for g in sorted(groups.tolist()) for h in range(g * size, (g + 1) * size)))
    return chosen


def recency_ratio(layer: Layer, window: int) -> Tensor:
    """RR ``(H,)`` on the inputs of ``layer``."""
    x, d = layer.inputs(), layer.head_dim
    seen, place = layer.mask.dense(x.shape[1]), torch.arange(x.shape[1])
    near = place > place[:, None] - window
    total = torch.zeros(layer.heads, dtype=x.dtype)
    for row in x.split(1):
        flat = (row @ layer.weights[f"W_{n}"] + layer.weights.get(f"b_{n}", 0.0) for n in "qk")
        q, k = (by_head(z, n) for z, n in zip(flat, (layer.heads, layer.kv_heads), strict=True))
        if layer.theta is not None:
            q, k = (turn_pairs(z.unflatten(-1, (2, d // 2)), layer.theta).flatten(-2) for z in (q, k))
        k = k.repeat_interleave(layer.heads // layer.kv_heads, dim=1)
        p = (q @ k.mT / d**0.5).masked_fill(~seen, float("-inf")).softmax(-1)
        total += (p * near).sum(-1)[0].mean(-1)
    return total / len(x)
