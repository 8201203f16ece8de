"""Where a mixer stands in its model, who makes its weights, and what parameters ask of the optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

INIT_STD = 0.02


class Plain:
    """The default weight provider: one `nn.Linear` per name."""

    def linear(
        self,
        name: str,
        d_in: int,
        d_out: int,
        bias: bool = False,
        std: float = INIT_STD,
        parts: Sequence[int] | None = None,
    ) -> nn.Module:
        """A linear map, weights N(0, std²), zero bias.

        Args:
            name: which matrix of the layer it is.
            parts: widths of the matrices that lie side by side in it (default: it is one); a provider that
                shares or makes weights may treat each on its own. What it returns may have
                ``weight_flops()``, the FLOPs of making the weights once per forward.
        """
        layer = nn.Linear(d_in, d_out, bias=bias)
        nn.init.normal_(layer.weight, std=std)
        if bias:
            nn.init.zeros_(layer.bias)
        return layer


@dataclass(frozen=True)
class Site:
    """Where a mixer stands: ``layer`` of ``depth``, the longest sequence, who makes its weights, and the
    modules that the layers of its model share.
    """

    layer: int = 0
    depth: int = 1
    max_len: int = 2048
    weights: Plain = field(default_factory=Plain)
    bank: dict[str, nn.Module] | None = None

    def shared(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """The module that all layers of the model know by ``name``, made by the first that asks.

        Register it on a stage: each layer then has it among its parameters, a model counts it once.
        """
        bank = {} if self.bank is None else self.bank
        if name not in bank:
            bank[name] = make()
        return bank[name]

    @property
    def out_std(self) -> float:
        """Standard deviation of output projections: the stream keeps its scale over depth."""
        return INIT_STD / math.sqrt(2 * self.depth)


def flag(
    param: nn.Parameter, *, decay: bool = True, lr_scale: float = 1.0, reinit: bool = True
) -> nn.Parameter:
    """Writes on a parameter what it asks of the optimiser and of initialisation passes."""
    param.no_weight_decay, param.lr_scale, param.no_reinit = not decay, lr_scale, not reinit
    return param
