"""What a configuration spends: counted from the built model's `cost`, never from a formula of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from attnzoo import create_model
from attnzoo.cost import Cost
from attnzoo.model import LanguageModel
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


class _Undrawn(TorchFunctionMode):
    """Initial weights are not drawn, which is most of the time that a model without storage takes."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, torch.Tensor.normal_, nn.init.uniform_, torch.Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _build(config: Mapping[str, Any], vocab_size: int) -> LanguageModel:
    with torch.device("meta"), _Undrawn():
        return create_model(**model_options(config, vocab_size))
