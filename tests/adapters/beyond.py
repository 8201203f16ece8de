"""Names of what `attnzoo.attention.beyond` adds."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.attention.beyond.discrete_kv_bottleneck import Bottleneck
from attnzoo.attention.beyond.recurrent_memory_chunked import MemoryReads
from golden import linear, matrix, plain


def _values(given: Any, stage: Bottleneck) -> Tensor:
    """The values; the frozen matrices come with them."""
    stage.R.copy_(given["R"])
    stage.keys.copy_(given["kappa|keys"])
    return given["V|values"]


WEIGHTS = {
    Bottleneck: {"values": _values, "gain": lambda given, stage: given["s"].reshape(1)},
    MemoryReads: {
        "gate.weight": linear("W_g"),
        "gate.bias": plain("b_g"),
        "write.weight": linear("W_m"),
        "mem_kv.weight": linear("W_mk", "W_mv"),
        "mix": matrix("f"),
    },
}
# its x is a noised and a clean copy, which the mixer must be told: tests/zoo/test_efficient_dlm.py reads it
LAYERED = {"efficient_dlm": True}
