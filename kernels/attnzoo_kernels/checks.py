"""The checks that every op makes of its operands; each failure is one line with the way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floats(tensors: Mapping[str, Tensor | None], like: str) -> None:
    """All given tensors have a floating dtype and the device of ``tensors[like]``."""
    device = tensors[like].device
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype not in FLOATS:
            raise ValueError(f"{name}: needs a floating-point dtype, got {x.dtype}; convert it first")
        if x.device != device:
            raise ValueError(f"{name}: needs {like}'s device {device}, got {x.device}; move it there")


def check_same_dtype(tensors: Mapping[str, Tensor | None], like: str) -> None:
    for name, x in tensors.items():
        if x is not None and x.dtype != tensors[like].dtype:
            raise ValueError(f"{name}: needs {like}'s dtype {tensors[like].dtype}, got {x.dtype}; convert it")


def check_shape(name: str, x: Tensor | None, *legal: Sequence[int]) -> None:
    """``x`` has one of the shapes and no empty axis."""
    if x is None:
        return
    if tuple(x.shape) not in {tuple(shape) for shape in legal} or 0 in x.shape:
        wanted = " or ".join(str(tuple(shape)) for shape in legal)
        raise ValueError(f"{name}: needs shape {wanted}, without an empty axis, got {tuple(x.shape)}")


def check_choice(name: str, value: object, legal: Sequence[object]) -> None:
    if value not in legal:
        raise ValueError(f"{name}: needs one of {', '.join(map(str, legal))}, got {value!r}")
