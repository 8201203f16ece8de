"""Causal softmax attention of the last T of S tokens on a GPU, without a table of T x S: prefill in chunks,
and ranks that share sequences.

torch offers it as `torch.nn.attention.bias.causal_lower_right`, a subclass of tensors that cannot be made on
fake tensors, while operations are counted, or in compiled code; so flash attention is called here as that
class would call it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.overrides import handle_torch_function, has_torch_function

WIDTHS = 8  # the kernel wants heads of a multiple of it


def last_queries(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """Query i reads keys 0 to S - T + i.

    Args:
        q: ``(B, H, T, d)``; k, v: ``(B, G, S, d)``, consecutive query heads sharing; read in v's dtype, or in
            that of autocast, which does not reach the kernel by itself.

    Returns:
        ``(B, H, T, d)`` or some zeros wider, or None where the kernel does not take them: in fp32, in heads
        wider than 256, on AMD's and older GPUs.
    """
    dtype, at = v.dtype, q.device.type
    if dtype == torch.float32 and torch.is_autocast_enabled(at):
        dtype = torch.get_autocast_dtype(at)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if missing := -q.shape[-1] % WIDTHS:
        q, k, v = (F.pad(z, (0, missing)) for z in (q, k, v))
    if not takes(q, k, v):
        return None
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[0]


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether flash attention does; a torch function mode may answer for tensors like it."""
    if has_torch_function((q, k, v)):
        return handle_torch_function(takes, (q, k, v), q, k, v)
    if torch.version.hip is not None:  # the diagonal of AMD's kernels may begin at the first key
        return False
    return can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, k.shape[1] != q.shape[1]))
