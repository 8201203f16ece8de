"""Variants that share keys and values among heads, or change which there are."""

from __future__ import annotations

from typing import Any

import torch

from attnzoo.attention.sharing.dha import FusedKV
from attnzoo.attention.sharing.diffqkv import AugmentedQ, SmallKeys
from attnzoo.attention.sharing.kdgqa import AllocatedKV
from attnzoo.attention.sharing.kv_shift import TokenShift
from attnzoo.attention.sharing.kvt import KeyAsQuery, KeyPositionBias
from attnzoo.attention.sharing.sqa import TiledQueries
from attnzoo.attention.sharing.wgqa import WeightedKV
from attnzoo.attention.stages.project import MappedQKV
from golden import linear, matrix, plain

FUSED = {"qkv_proj.weight": linear("W_q", "W_k", "W_v"), "qkv_proj.bias": plain("b_q", "b_k", "b_v")}
AUGMENT = {"augment.up.weight": linear("W_gate", "W_up"), "augment.down.weight": linear("W_down")}

WEIGHTS: dict[type, dict[str, Any]] = {
    MappedQKV: FUSED,
    AllocatedKV: FUSED,
    TiledQueries: FUSED,
    FusedKV: FUSED | {"omega_k": plain("omega_k"), "omega_v": plain("omega_v")},
    WeightedKV: FUSED | {"k_weights": plain("w_k"), "v_weights": plain("w_v")},
    AugmentedQ: FUSED | AUGMENT,
    SmallKeys: FUSED | AUGMENT | {"k_up.weight": linear("U")},
    TokenShift: {f"{name}{i}": plain(f"{name}{i}") for name in ("alpha", "beta") for i in (1, 2)},
    KeyAsQuery: {"kv_proj.weight": linear("W_k", "W_v"), "kv_proj.bias": plain("b_k", "b_v")},
    KeyPositionBias: {"a": matrix("a")},
}


def _merged(case: Any, expected: torch.Tensor, which: int) -> None:
    from test_golden import close

    weight, _ = case.mixer().project.merged()
    close(weight.split([case.x.shape[-1], expected.shape[1], expected.shape[1]])[which].T, expected)


def _mean(case: Any, expected: torch.Tensor) -> None:
    from test_golden import close

    mean = {name: torch.full_like(case.weights[name], 0.5) for name in ("w_k", "w_v")}
    close(case._replace(weights=case.weights | mean).mixer()(case.x), expected)


def _settings(case: Any, cases: dict[str, dict[str, Any]]) -> None:
    from test_golden import close, decode

    for name, other in cases.items():
        there = case._replace(options=other["spec_options"], weights=other["weights"], x=other["x"])
        for options in (there.options, {"num_heads": there.options["num_heads"], "setting": name}):
            mixer = there._replace(options=options).mixer()
            close(mixer(there.x), other["y"])
            close(decode(mixer, there.x, 11), other["y"])


CHECKS = {
    "wgqa/merged_W_k": lambda case, expected: _merged(case, expected, 1),
    "wgqa/merged_W_v": lambda case, expected: _merged(case, expected, 2),
    "wgqa/y_mean_init": _mean,
    "sqa/other_settings": _settings,
}
