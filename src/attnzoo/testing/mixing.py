"""The weights with which a mixer adds up its values, as a table: for row sums, ranks, locality, causality."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attnzoo.attention import timeline
from attnzoo.attention.base import Mixer, Stage
from attnzoo.attention.call import Call
from attnzoo.context import Context

DENOMINATOR = 10  # combine stages up to this rank belong to the sum, those after it to the output
LEAST_EXACT = 1e-3  # relative, of a product in fp32


class Values(Stage):
    """Refine stage that hands the same values ``(T, n)`` to all heads."""

    rank = math.inf

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, self.values.to(v).expand(*v.shape[:2], -1, -1)


@torch.no_grad()
def mixing_matrix(mixer: Mixer, x: Tensor, ctx: Context | None = None) -> Tensor:
    """P of ``o = P v``: head outputs, denominators included, norms and gates not, by the refined values v.

    One-hot values go through the mixer as it stands, so that no variant says it anew.

    Args:
        mixer: of a frame with values of its own (scores, or a state), linear in them.
        x: ``(B, T, D)``. ctx: documents and positions, without padding.

    Returns:
        ``(B, H, T, T)``, the query's row first.

    Raises:
        ValueError: the mixer has no such values, or is not linear in them; ``ctx`` has padding.
    """
    if not hasattr(mixer, "refine") or getattr(mixer.project, "late", False):
        raise ValueError(
            f"mixer: its values must be made before they are read, got {mixer.name!r}, which has none or "
            "makes them at the read from something smaller"
        )
    if ctx is not None and ctx.segment_ids is not None and bool((ctx.segment_ids == 0).any()):
        raise ValueError("segment_ids: padding has no weights, got ids of 0; leave those tokens out")
    length = x.shape[1]
    weights = _read(mixer, x, ctx, torch.eye(length, dtype=x.dtype, device=x.device))
    probe = torch.randn(length, 3, dtype=x.dtype, device=x.device, generator=_fixed(x.device))
    got, want = weights @ probe, _read(mixer, x, ctx, probe)
    if not float((got - want).abs().max()) <= LEAST_EXACT * float(want.abs().max()):
        raise ValueError(f"mixer: must be linear in its values, got {mixer.name!r}")
    return weights


def _fixed(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _read(mixer: Mixer, x: Tensor, ctx: Context | None, values: Tensor) -> Tensor:
    """``(B, H, T, n)`` what the heads read of ``values`` ``(T, n)``."""
    refine, combine, ctx = mixer.refine, mixer.combine, ctx or Context()
    line = timeline.read(ctx, *x.shape[:2], x.device)
    try:
        mixer.refine = nn.ModuleList([*refine, Values(values)])
        mixer.combine = nn.ModuleList(stage for stage in combine if stage.rank <= DENOMINATOR)
        return mixer.heads(Call(mixer.site, x, ctx, line, None, "auto")).transpose(1, 2)
    except RuntimeError as error:
        raise ValueError(f"mixer: reads other values beside its own, got {mixer.name!r}") from error
    finally:
        mixer.refine, mixer.combine = refine, combine
