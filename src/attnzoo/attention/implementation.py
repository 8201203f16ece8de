"""Which implementation a mixer runs, by the kind of device: decided at construction, with a reason."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from attnzoo.attention.base import Choice, Choices, Stage, same
from attnzoo.attention.stages.mask import Static
from attnzoo.ops.adapters import band_of, has_xformers
from attnzoo_kernels.launch import has_triton, interpreting
from attnzoo_kernels.scan import LARGEST


def choose_score(
    asked: str, own: Mapping[str, Stage], mask: Stage, late: bool, between: list[str]
) -> Choices:
    """For `ScoreAttention`.

    Args:
        asked: the option ``impl``.
        own: the mixer's own score and normalise stages by slot; empty = dot product and softmax.
        mask: the mask stage.
        late: keys are made from what is cached; between: stages that act on them and so must see them whole.

    Raises:
        ValueError: the request cannot be met; the message says which condition failed.
    """
    what = " and ".join(own)
    why = f"own {what}: no fused path, query-chunked torch" if own else "dot product and softmax: fused"
    if late and between:
        why += f"; decodes with materialised keys, since {' and '.join(between)} acts on them"
    no_kernel = _without_kernel(own, mask)
    if asked == "auto" and own:
        plain = Choice("reference", why)
        kernel = Choice("triton", f"own {what}: fused in a kernel") if no_kernel is None else plain
        return {"cpu": plain, "cuda": kernel if has_triton() else plain}
    if asked == "auto":
        decode = "; decodes cached latents in a kernel" if late and not between and has_triton() else ""
        return {"cpu": Choice("sdpa", why), "cuda": Choice("sdpa", why + decode)}
    if asked == "reference":
        return same(asked, "asked for")
    if asked == "triton":
        if no_kernel is not None:
            raise ValueError(f"impl: 'triton' cannot run this mixer: {no_kernel}; use auto or reference")
        require_triton()
        return same(asked, "asked for")
    if own:
        raise ValueError(
            f"impl: {asked!r} computes dot products and softmax, {next(iter(own))} here is its own; "
            "use auto or reference"
        )
    if asked == "xformers":
        _require_xformers(mask)
    return same(asked, "asked for; no backward on a CPU" if asked == "flex" else "asked for")


def _without_kernel(own: Mapping[str, Stage], mask: Stage) -> str | None:
    """Why no kernel of ours computes these stages under this mask; None where one does."""
    if not (isinstance(mask, Static) and band_of(mask.mask) is not None):
        return "the kernels know causal masks, windows and sinks only"
    if not own:
        return None
    stage = next(iter(own.values()))
    if len(own) > 1 or not hasattr(stage, "op"):
        return f"no kernel has its {' and '.join(own)}"
    return stage.refusal()


def choose_scan(asked: str, width: int) -> Choices:
    """For `RecurrentAttention` with keys of ``width``; see `choose_score`."""
    plain = Choice("reference", "chunked scan in torch matmuls")
    if asked == "auto":
        fits = has_triton() and width <= LARGEST
        return {"cpu": plain, "cuda": Choice("triton", "chunked scan in kernels") if fits else plain}
    if asked == "reference":
        return same(asked, "asked for: chunked scan in torch matmuls")
    if asked == "triton":
        if width > LARGEST:
            raise ValueError(f"impl: 'triton' takes keys up to {LARGEST} wide, got {width}; use reference")
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


def _require_xformers(mask: Stage) -> None:
    if not has_xformers():
        raise ValueError(
            "impl: 'xformers' needs the package xformers, which is missing; install attnzoo[xformers]"
        )
    if not torch.cuda.is_available():
        raise ValueError("impl: 'xformers' has no CPU operators, and there is no GPU here; use auto or sdpa")
    band = band_of(mask.mask) if isinstance(mask, Static) else None
    if band is None or band[1]:
        raise ValueError("impl: 'xformers' knows causal masks and windows without sinks; use sdpa or flex")
