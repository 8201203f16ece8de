"""Symbols and options of flare and of the architectures of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.attention.hybrid.grassmann import Planes
from attnzoo.attention.hybrid.mega import GatedHead, Update
from attnzoo.attention.hybrid.spectformer import Filter
from attnzoo.attention.linear.flare import KeysValues, Latents
from attnzoo.context import Context
from golden import Options, Rule, Symbols, linear, matrix, plain


def _residual(side: str, part: str) -> Rule:
    """Layers of a residual MLP, first, hidden, last; or the one linear map."""

    def rule(given: Symbols, stage: KeysValues) -> Tensor:
        return given[f"{part}_{side}"].T if part == "W" else given[f"{part}_{side}"]

    return rule


def _states(symbol: str) -> Rule:
    """``(D, N, 1)`` in the files."""
    return lambda given, stage: given[symbol].flatten(1)


WEIGHTS: dict[type, dict[str, Rule]] = {
    KeysValues: {
        f"{side}.0.{ours}": _residual(side, part)
        for side in "kv"
        for ours, part in (("weight", "W"), ("bias", "b"))
    },
    Latents: {"Q": matrix("Q_L")},
    Planes: {
        "reduce.weight": linear("W_r"),
        "reduce.bias": plain("b_r"),
        "plane.weight": linear("W_p"),
        "plane.bias": plain("b_p"),
        "blend.weight": linear("W_alpha"),
        "blend.bias": plain("b_alpha"),
    },
    Filter: {"W_hat": matrix("W_hat")},
    GatedHead: {
        "ln_gain": plain("ln_w"),
        "ln_bias": plain("ln_b"),
        "ema.delta": _states("delta"),
        "ema.alpha": _states("alpha"),
        "ema.beta": _states("beta"),
        "ema.gamma": matrix("gamma"),
        "ema.omega": plain("omega"),
        "value.weight": linear("W_v"),
        "value.bias": plain("b_v"),
        "mixed.weight": linear("W"),
        "mixed.bias": plain("b"),
        "gamma_z": matrix("gamma_z"),
        "beta_z": matrix("beta_z"),
        "bias.table": plain("rel_bias"),
        "bias.a": plain("a"),
        "bias.b": plain("b_rot|rot_b"),
    },
    Update: {"hidden.weight": linear("W_h"), "hidden.bias": plain("b_h")},
}


def _no_heads(ours: Options) -> None:
    ours.setdefault("num_heads", 1)


def _mega(ours: Options) -> None:
    _no_heads(ours)
    chunk = ours.pop("chunk_size", -1)
    ours["attn_chunk"] = None if chunk == -1 else chunk
    if "max_positions" in ours:
        ours["max_seq_len"] = ours.pop("max_positions")


def _spectformer(ours: Options) -> None:
    _no_heads(ours)
    ours.pop("role", None)


OPTIONS: dict[str, Any] = {"grassmann": _no_heads, "mega": _mega, "spectformer": _spectformer}


def _final(case: Any, slot: str, expected: Tensor) -> None:
    from test_golden import check_cache

    check_cache(case, slot, expected)


def _taps(case: Any, expected: Tensor) -> None:
    torch.testing.assert_close(case.mixer().core.kernel(), expected, rtol=1e-9, atol=1e-12)


def _block(case: Any, expected: Tensor) -> None:
    x = case.extra["x_res"]
    y = case.mixer()(case.x, Context(residual=x))
    torch.testing.assert_close(x + y, expected, rtol=1e-9, atol=1e-12)


def _without_pair(case: Any, expected: Tensor) -> None:
    """The other reading of a token without a pair; it differs nowhere else."""
    y = case.mixer()(case.x)
    torch.testing.assert_close(y[:, 1:], expected[:, 1:], rtol=1e-9, atol=1e-12)
    assert (y[:, 0] - expected[:, 0]).abs().min() > 1e-9


CHECKS: dict[str, Any] = {
    "flare/final_lse": lambda case, expected: _final(case, "lse", expected),
    "spectformer/kappa": _taps,
    "mega/block_output": _block,
    "mega/x_res": lambda case, expected: torch.testing.assert_close(case.x, expected, rtol=0, atol=0),
    "grassmann/y_g_is_bias_where_no_pair": _without_pair,
}
