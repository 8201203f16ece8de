"""The scan's check on a device: kernels against the chunks in torch."""

from __future__ import annotations

import torch

from attnzoo_kernels import launch
from attnzoo_kernels.scan.chunked import scan_chunked
from attnzoo_kernels.scan.ops_delta import scan_delta
from attnzoo_kernels.scan.ops_plain import scan_plain


def worst(device: torch.device) -> tuple[float, float]:
    """Largest relative error of values and gradients on small cases, and what rounding explains."""
    draw, (B, T, H, K) = torch.Generator().manual_seed(0), (1, 150, 2, 64)
    normal = lambda *shape: torch.randn(*shape, generator=draw).to(device)  # noqa: E731
    q, k, v, e, a = (normal(B, T, H, K) / K**0.5 for _ in range(5))
    state, do = normal(B, H, K, K), normal(B, T, H, K)
    beta, g = normal(B, T, H).sigmoid(), -normal(B, T, H, K).abs()
    segments = torch.arange(T, device=device)[None] // 40
    error = 0.0
    for gate in (None, g[..., 0], g):
        for b, pair in ((None, (None, None)), (beta, (None, None)), (None, (e, a))):
            found = []
            for run in ("kernels", "torch"):
                given = [x if x is None else x.clone().requires_grad_() for x in (q, k, v, gate, b, *pair)]
                tail = (0.2, state, segments, 64)
                if run == "torch":
                    o, _ = scan_chunked(*given, *tail)
                elif b is None and pair[0] is None:
                    o, _ = scan_plain(*given[:4], *tail)
                else:
                    o, _ = scan_delta(*given, *tail)
                found.append((o.detach(), *torch.autograd.grad(o, [x for x in given if x is not None], do)))
            for got, exact in zip(*found, strict=True):
                error = max(error, ((got - exact).abs().max() / exact.abs().max()).item())
    return error, 2e-2 if launch.precision() == "tf32" else 5e-4
