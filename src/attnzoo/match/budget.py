"""What a configuration spends: counted from the built model's `cost`, never from a formula of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attnzoo import create_model
from attnzoo.cost import Cost
from attnzoo.model import LanguageModel
from attnzoo.model.undrawn import Undrawn
from attnzoo.train.objective import objective_of
from attnzoo.train.prepare import model_options
from attnzoo.train.settings import nearest

BUDGETS = {
    "params": "parameters",
    "train_flops": "training FLOPs per token",
    "cache": "bytes of cache",
}


def budget_of(config: Mapping[str, Any], budget: str, vocab_size: int) -> float:
    """What the model of a configuration spends of a budget.

    Args:
        config: resolved configuration; its groups `attention`, `model` and `data.seq_len` are read.
        budget: "params"; "train_flops", forward and backward per token of data at `data.seq_len`, as its
            objective has it; "cache", bytes that decoding one sequence of `data.seq_len` tokens holds, bf16.
        vocab_size: of the tokenizer.

    Raises:
        ValueError: an unknown budget, or a model that cannot be built.
    """
    if budget not in BUDGETS:
        raise ValueError(f"match: no budget {budget!r}; {nearest(budget, BUDGETS)}")
    length = config["data"]["seq_len"]
    if budget == "train_flops":
        model = _build(config, vocab_size)
        return objective_of(model).train_flops(model, length)[0]
    cost = cost_of(config, vocab_size)
    return cost.params if budget == "params" else length * cost.cache_bytes_per_token + cost.state_bytes


def cost_of(config: Mapping[str, Any], vocab_size: int = 1) -> Cost:
    """The costs of a configuration's model at `data.seq_len`."""
    return _build(config, vocab_size).cost(config["data"]["seq_len"])


def _build(config: Mapping[str, Any], vocab_size: int) -> LanguageModel:
    with torch.device("meta"), Undrawn():
        return create_model(**model_options(config, vocab_size))
