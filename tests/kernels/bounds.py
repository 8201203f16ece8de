"""How far a kernel may be from the fp64 reference: as far as rounding of the same formula explains."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within(name: str, got: Tensor, same_precision: Tensor, exact: Tensor, band: float = 0.0) -> None:
    """max |got - exact| <= 2 (max |same_precision - exact| + band).

    The band is what storing the result rounds away, and eight roundings of fp32 accumulation at the scale of
    the largest entry.

    Args:
        got: the kernel's result; same_precision: the reference's in the same dtypes; exact: in fp64.
        band: more of it, for a sum whose terms are larger than the result: what rounds away from the terms.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
    largest = exact.abs().max().item()
    band += largest * (torch.finfo(got.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps)
    error = (got.double() - exact).abs().max().item()
    explained = 2 * ((same_precision.double() - exact).abs().max().item() + band)
    assert error <= explained, f"{name}: off by {error:.3e}, rounding explains {explained:.3e}"
