"""Which implementation a mixer runs, by the kind of device: decided at construction, with a reason."""

from __future__ import annotations

import torch

from attnzoo.attention.base import Choice, Choices, same
from attnzoo.attention.stages.mask import Static
from attnzoo.ops.adapters import band_of, has_xformers
from attnzoo_kernels.launch import has_triton, interpreting


def choose_score(asked: str, own: dict[str, object], mask: object, late: str) -> Choices:
    """For `ScoreAttention`.

    Args:
        asked: the option ``impl``.
        own: the mixer's own score and normalise stages, by slot; empty = dot product and softmax. A stage
            that a kernel serves names it in ``op``.
        mask: the mask stage. late: what to add to the reason about decoding.

    Raises:
        ValueError: the request cannot be met; the message says which condition failed.
    """
    what = " and ".join(own)
    served = bool(own) and all(getattr(stage, "op", None) for stage in own.values())
    banded = isinstance(mask, Static) and band_of(mask.mask) is not None
    if asked == "auto":
        if not own:
            return same("sdpa", f"dot product and softmax: fused{late}")
        plain = Choice("reference", f"own {what}: no fused path, query-chunked torch{late}")
        if served and banded and has_triton():
            return {"cpu": plain, "cuda": Choice("triton", f"own {what}: fused in a kernel{late}")}
        return {"cpu": plain, "cuda": plain}
    if asked == "reference":
        return same(asked, f"asked for{late}")
    if own and not (asked == "triton" and served):
        raise ValueError(
            f"impl: {asked!r} computes dot products and softmax, {next(iter(own))} here is its own; "
            f"use auto{', triton' if served else ''} or reference"
        )
    if asked == "flex":
        return same(asked, "asked for; no backward on a CPU")
    if asked != "sdpa" and not banded:
        raise ValueError(
            f"impl: {asked!r} takes causal masks, windows and sinks only, got another mask; use flex"
        )
    if asked == "xformers":
        _require_xformers(mask)
    if asked == "triton":
        require_triton()
    return same(asked, f"asked for{late}")


def choose_scan(asked: str) -> Choices:
    """For `RecurrentAttention`; see `choose_score`."""
    plain = Choice("reference", "chunked scan in torch matmuls")
    if asked == "auto":
        kernels = Choice("triton", "chunked scan in kernels") if has_triton() else plain
        return {"cpu": plain, "cuda": kernels}
    if asked == "reference":
        return same(asked, "asked for")
    if asked == "triton":
        require_triton()
        return same(asked, "asked for")
    raise ValueError(
        f"impl: {asked!r} does not run a scan, got impl={asked!r}; use auto, triton or reference"
    )


def require_triton() -> None:
    if not has_triton():
        raise ValueError("impl: 'triton' needs the package triton, which is missing; install attnzoo[triton]")
    if not (torch.cuda.is_available() or interpreting()):
        raise ValueError("impl: 'triton' needs a GPU, and there is none here; use auto or reference")


def _require_xformers(mask: Static) -> None:
    if not has_xformers():
        raise ValueError(
            "impl: 'xformers' needs the package xformers, which is missing; install attnzoo[xformers]"
        )
    if not torch.cuda.is_available():
        raise ValueError("impl: 'xformers' has no CPU operators, and there is no GPU here; use auto or sdpa")
    if mask.mask.sinks():
        raise ValueError(f"impl: 'xformers' has no sinks, got {mask.mask}; use auto, sdpa or flex")
