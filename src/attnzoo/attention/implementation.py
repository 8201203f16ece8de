"""Which implementation a mixer runs, by the kind of device: decided at construction, with a reason."""

from __future__ import annotations

import torch

from attnzoo.attention.base import Choice, Choices, same
from attnzoo.attention.stages.mask import Static
from attnzoo.ops.adapters import band_of, has_xformers
from attnzoo_kernels.launch import has_triton


def choose_score(asked: str, own: list[str], mask: object, late: bool, between: list[str]) -> Choices:
    """For `ScoreAttention`.

    Args:
        asked: the option ``impl``.
        own: slots with a stage of the mixer's own; empty = dot product and softmax.
        mask: the mask stage.
        late: keys are made from what is cached; between: stages that act on them and so must see them whole.

    Raises:
        ValueError: the request cannot be met; the message says which condition failed.
    """
    what = " and ".join(own)
    why = f"own {what}: no fused path, query-chunked torch" if own else "dot product and softmax: fused"
    if late and between:
        why += f"; decodes with materialised keys, since {' and '.join(between)} acts on them"
    if asked == "auto" and own:
        return same("reference", why)
    if asked == "auto":
        decode = "; decodes cached latents in a kernel" if late and not between and has_triton() else ""
        return {"cpu": Choice("sdpa", why), "cuda": Choice("sdpa", why + decode)}
    if asked == "reference":
        return same(asked, "asked for")
    if asked == "triton":
        raise ValueError(
            "impl: 'triton' has no kernel that trains scores in this version, got impl='triton'; "
            "use auto, reference, sdpa, flex or xformers"
        )
    if own:
        raise ValueError(
            f"impl: {asked!r} computes dot products and softmax, {own[0]} here is its own; "
            "use auto or reference"
        )
    if asked == "xformers":
        _require_xformers(mask)
    return same(asked, "asked for; no backward on a CPU" if asked == "flex" else "asked for")


def choose_scan(asked: str) -> Choices:
    """For `RecurrentAttention`; see `choose_score`."""
    if asked in ("auto", "reference"):
        return same("reference", "chunked scan in torch matmuls")
    raise ValueError(f"impl: {asked!r} does not run a scan, got impl={asked!r}; use auto or reference")


def _require_xformers(mask: object) -> None:
    if not has_xformers():
        raise ValueError(
            "impl: 'xformers' needs the package xformers, which is missing; install attnzoo[xformers]"
        )
    if not torch.cuda.is_available():
        raise ValueError("impl: 'xformers' has no CPU operators, and there is no GPU here; use auto or sdpa")
    band = band_of(mask.mask) if isinstance(mask, Static) else None
    if band is None or band[1]:
        raise ValueError("impl: 'xformers' knows causal masks and windows without sinks; use sdpa or flex")
