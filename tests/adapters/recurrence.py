"""What golden files of the family ``recurrence`` say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.attention.recurrence.hgrn2 import TiedKeys
from attnzoo.attention.recurrence.log_linear import LevelScan
from attnzoo.attention.recurrence.mamba2 import Skip, SSMProject
from attnzoo.attention.recurrence.rwkv7 import Goose, MixGate, NormBonus, ShiftedLerp
from attnzoo.attention.stages.combine import FullNorm, LowRankGate
from attnzoo.attention.stages.gates import Beta, ChannelDecayBeta, LowRankDecay, StepDecay
from attnzoo.context import Context
from golden import linear, matrix, plain

WEIGHTS = {
    Beta: {"beta.weight": linear("W_beta")},
    LowRankDecay: {"down.weight": linear("W_1"), "up.weight": linear("W_2"), "up.bias": plain("b")},
    ChannelDecayBeta: {
        "down.weight": linear("F_1"),
        "up.weight": linear("F_2"),
        "beta.weight": linear("W_beta"),
        "A_log": plain("A_log"),
        "dt_bias": plain("dt_bias"),
    },
    LowRankGate: {"down.weight": linear("G_1"), "gate.weight": linear("G_2"), "gate.bias": plain("b")},
    FullNorm: {"gain": plain("gamma_o|gamma")},
    StepDecay: {"A_log": plain("A_log"), "dt_bias": plain("dt_bias")},
    SSMProject: {"in_proj.weight": linear("W_in"), "in_proj.bias": plain("b_in")},
    Skip: {"D": plain("D")},
    TiedKeys: {"bounds.Gamma": matrix("Gamma")},
    LevelScan: {
        "weights.weight": linear("W_lambda"),
        "weights.bias": plain("b_lambda"),
        "Lambda": matrix("Lambda"),
    },
    ShiftedLerp: {
        "mu": lambda given, stage: torch.stack([given[f"mu_{name}"] for name in "rwkvag"]),
        **{f"{name}.weight": linear(f"W_{name}") for name in "rkv"},
        "v_mix.down.weight": linear("W_v1"),
        "v_mix.up.weight": linear("W_v2"),
        "v0": plain("v0"),
    },
    Goose: {
        "decay.down.weight": linear("W_w1"),
        "decay.up.weight": linear("W_w2"),
        "rate.down.weight": linear("W_a1"),
        "rate.up.weight": linear("W_a2"),
        **{name: plain(name) for name in ("w0", "a0", "k_k", "k_a")},
    },
    NormBonus: {"gain": plain("gn_w"), "bias": plain("gn_b"), "r_k": matrix("r_k")},
    MixGate: {"low.down.weight": linear("W_g1"), "low.up.weight": linear("W_g2")},
}


def _renamed(ours: dict[str, Any], **names: str) -> None:
    for theirs, mine in names.items():
        if theirs in ours:
            ours[mine] = ours.pop(theirs)


def _deltanet(ours: dict[str, Any]) -> None:
    _renamed(ours, qk_norm="key_norm")


def _by_width(ours: dict[str, Any]) -> None:
    # the width of heads says how many there are
    if ours.get("base") != "gated_deltanet":
        ours.setdefault("num_heads", 1)
    _renamed(ours, chunk="chunk_size", layer="layer_idx")


def _hgrn2(ours: dict[str, Any]) -> None:
    _by_width(ours)
    _renamed(ours, head_dim="expand_ratio")


def _lightning(ours: dict[str, Any]) -> None:
    _renamed(ours, block_size="chunk_size", layer="layer_idx")


OPTIONS = {
    "deltanet": _deltanet,
    "mamba2": _by_width,
    "rwkv7": _by_width,
    "log_linear": _by_width,
    "hgrn2": _hgrn2,
    "lightning_attention": _lightning,
}


def _v_first(case: Any, expected: Tensor) -> None:
    ctx = Context()
    case.mixer()(case.x, ctx)
    torch.testing.assert_close(ctx.shared["v_first"], expected, rtol=1e-9, atol=1e-12)


CHECKS = {"rwkv7/v_first_out": _v_first}
