"""Latent attentions and matrix factorisation attention."""

from __future__ import annotations

from typing import Any

import torch

from attnzoo.attention.latent.gla_latent import GroupedLatent
from attnzoo.attention.latent.mfa import KeyReuse, OneHead, SharedOut
from attnzoo.attention.latent.tpla import ShardedLatent
from golden import linear, matrix, plain

QUERIES = {"q_down.weight": linear("W_dq"), "q_gain": plain("gamma_q"), "q_up.weight": linear("W_uq|W_q")}
FACTORS = {
    "q_down.weight": linear("S_q"),
    "gain": plain("gamma"),
    "q_up.weight": linear("Q"),
    "q_up.bias": plain("b_q"),
}
DOWN = {"kv_down.weight": linear("W_dkv")}

WEIGHTS: dict[type, dict[str, Any]] = {
    GroupedLatent: QUERIES
    | DOWN
    | {
        "kv_gain": lambda given, stage: given["gamma_kv"].flatten(),
        "kv_up.weight": lambda given, stage: given["W_ukv"].mT.flatten(0, 1),
    },
    OneHead: FACTORS | {"kv_proj.weight": linear("S_k", "S_v"), "kv_proj.bias": plain("b_k", "b_v")},
    KeyReuse: FACTORS
    | {
        "kv_proj.weight": linear("S_k"),
        "kv_proj.bias": plain("b_k"),
        "mix.weight": matrix("N"),
        "alpha": plain("alpha"),
    },
    SharedOut: {
        "per_head.weight": linear("O"),
        "out_proj.weight": linear("S_o"),
        "out_proj.bias": plain("b_o"),
    },
    ShardedLatent: QUERIES | DOWN | {"kv_gain": plain("gamma_kv"), "kv_up.weight": linear("W_ukv")},
}


def _other(case: Any, expected: torch.Tensor, **options: Any) -> None:
    """The same weights under other options, at once and decoded."""
    from test_golden import close, decode

    mixer = case._replace(options=case.options | options).mixer()
    close(mixer(case.x), expected)
    close(decode(mixer, case.x, 5), expected)


def _gains(case: Any, _: Any) -> None:
    _other(case, case.extra["y_mu"], shard_gain=case.extra["mu"])


def _retrofit(case: Any, _: Any) -> None:
    shares, expected = case.extra["rho_retrofit"], case.extra["y_sharded_retrofit"]
    options = {"shard_norm": "sharded", "shard_share": shares, "shard_gain": [1 / share for share in shares]}
    _other(case, expected, **options)


CHECKS = {
    "tpla/y_mla": lambda case, y: _other(case, y, latent_shards=1),
    "tpla/y_shards4": lambda case, y: _other(case, y, latent_shards=4),
    "tpla/mu": _gains,
    "tpla/y_mu": _gains,
    "tpla/y_sharded_norm": lambda case, y: _other(case, y, shard_norm="sharded"),
    "tpla/rho_retrofit": _retrofit,
    "tpla/y_sharded_retrofit": _retrofit,
}
