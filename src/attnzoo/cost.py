"""What a mixer or a model costs, counted from its method; see `Cost`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

PARTS = ("projections", "mixing", "gates")


class Work(NamedTuple):
    """Matmul-like work of one stage over one sequence of ``T`` tokens, 2 FLOPs per multiply-add.

    Args:
        part: one of "projections", "mixing", "gates".
        name: what it is, for the breakdown.
        flops: FLOPs that the method needs, for the whole sequence.
        executed: FLOPs that the chosen implementation runs (default: ``flops``).
        masked: why ``executed`` exceeds ``flops``, where it does.
        per_head: scales with the heads that a router activates.
    """

    part: str
    name: str
    flops: float
    executed: float | None = None
    masked: str = ""
    per_head: bool = False


@dataclass(frozen=True)
class Cost:
    """Costs of a mixer or a model at one sequence length; FLOPs are per token, averaged over the sequence.

    Args:
        params: parameters.
        forward_flops: FLOPs that the method needs: matmul-like work, visible pairs and active heads only.
        executed_flops: FLOPs that the chosen implementation runs; MFU and time ratios use these.
        train_flops: forward and backward, three times ``forward_flops``.
        cache_bytes_per_token: what decoding stores for each further token.
        state_bytes: what decoding stores whatever the length (rings, convolution tails, scan states).
        weight_flops: FLOPs per forward call that do not depend on the tokens.
        exact: False where the count depends on the data; ``forward_flops`` is then an upper bound.
        split: ``forward_flops`` by "projections", "mixing", "gates" (and "mlp", "head" of a model).
        masked: what the implementation computes and masks away: name -> FLOPs per token.
        elementwise: work that is listed, not counted: name -> operations per token.
    """

    params: int
    forward_flops: float
    executed_flops: float
    cache_bytes_per_token: float
    state_bytes: int
    weight_flops: float = 0.0
    exact: bool = True
    split: dict[str, float] = field(default_factory=dict)
    masked: dict[str, float] = field(default_factory=dict)
    elementwise: dict[str, float] = field(default_factory=dict)

    @property
    def train_flops(self) -> float:
        return 3 * self.forward_flops


def tally(work: Iterable[Work], length: int, active: float = 1.0) -> dict[str, object]:
    """FLOP fields of `Cost` from the stages' work; ``active`` is the share of heads that a router keeps."""
    split = dict.fromkeys(PARTS, 0.0)
    executed, masked = 0.0, {}
    for item in work:
        needed = item.flops * (active if item.per_head else 1.0) / length
        runs = (item.flops if item.executed is None else item.executed) / length
        split[item.part] += needed
        executed += runs
        if runs != needed:
            reason = item.masked if runs != item.flops / length else "inactive heads"
            masked[f"{item.name}: {reason}"] = runs - needed
    return {
        "forward_flops": sum(split.values()),
        "executed_flops": executed,
        "split": split,
        "masked": masked,
    }


def add_costs(costs: Iterable[Cost], extra: dict[str, float], params: int) -> Cost:
    """Cost of a stack: the layers' costs plus ``extra`` forward FLOPs per token by name."""
    costs = list(costs)
    split = dict(extra)
    masked: dict[str, float] = {}
    elementwise: dict[str, float] = {}
    for cost in costs:
        for total, part in ((split, cost.split), (masked, cost.masked), (elementwise, cost.elementwise)):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
    more = sum(extra.values())
    return Cost(
        params=params,
        forward_flops=sum(c.forward_flops for c in costs) + more,
        executed_flops=sum(c.executed_flops for c in costs) + more,
        cache_bytes_per_token=sum(c.cache_bytes_per_token for c in costs),
        state_bytes=sum(c.state_bytes for c in costs),
        weight_flops=sum(c.weight_flops for c in costs),
        exact=all(c.exact for c in costs),
        split=split,
        masked=masked,
        elementwise=elementwise,
    )
