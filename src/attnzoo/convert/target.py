"""What a conversion reads and what it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

PLAIN = ("mha", "gqa", "mqa", "sqa", "fixed_head_size")  # separate queries, keys and values, all heads alike
LATENT = (
    *("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("latent_norm", "allow_expand", "qkv_bias"),
)


class Target(NamedTuple):
    """One layer of the result: a variant, the options beside those it keeps, its weights by symbol."""

    name: str
    options: dict[str, Any]
    weights: dict[str, Tensor]


class Method(NamedTuple):
    """A conversion.

    Args:
        sources: variants it reads. reads_text: whether it needs calibration text.
        biases: whether the target has biases of queries, keys and values.
        keeps: options of the source that the target has too, beside those of the frame.
    """

    run: Callable[..., list[Target]]
    sources: tuple[str, ...]
    reads_text: bool = False
    biases: bool = False
    keeps: tuple[str, ...] = ()
