"""What the tests of kernelised attention share: projections by hand, and mixers driven on given q, k, v."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.attention.base import Mixer
from oracles import rotate

T = 13
GOLDEN = Path(__file__).parent.parent / "golden"


def make(name: str, dim: int = 16, heads: int = 4, **options: Any) -> Mixer:
    """A mixer in fp64 whose every parameter is far from its start."""
    mixer = attnzoo.create(name, dim, heads, **options).double().requires_grad_(False)
    for param in mixer.parameters():
        param.add_(torch.randn_like(param) * (0.3 if param.dim() == 2 else 0.1))
    return mixer


def heads_of(mixer: Mixer, x: Tensor) -> list[Tensor]:
    """q ``(H, T, d)``, k and v ``(H, T, ·)`` of one row ``x`` ``(T, D)``, groups repeated."""
    project, flat = mixer.project, x @ mixer.project.qkv_proj.weight.T
    if project.qkv_proj.bias is not None:
        flat = flat + project.qkv_proj.bias
    parts = zip(flat.split(project.sizes, dim=1), project.heads, strict=True)
    z = [part.reshape(len(x), h, -1).transpose(0, 1) for part, h in parts]
    return [part.repeat_interleave(mixer.num_heads // len(part), dim=0) for part in z]


def out_of(mixer: Mixer, o: Tensor) -> Tensor:
    """Heads ``(H, T, d)`` through the output projection."""
    y = o.transpose(0, 1).flatten(1) @ mixer.out.out_proj.weight.T
    return y if mixer.out.out_proj.bias is None else y + mixer.out.out_proj.bias


def driven(name: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Mixer, Tensor]:
    """A mixer and an input whose projections are q, k, v ``(B, T, H, d)``; heads open its output."""
    H, d = q.shape[2:]
    x = torch.cat([q, k, v], dim=2).flatten(2)
    mixer = attnzoo.create(name, x.shape[2], H, head_dim=d, **options).double().requires_grad_(False)
    mixer.project.qkv_proj.weight.copy_(torch.eye(x.shape[2]))
    mixer.out.out_proj.weight.copy_(torch.eye(x.shape[2])[:, : H * d])
    return mixer, x


def run(mixer: Mixer, x: Tensor, like: Tensor) -> Tensor:
    """The heads' outputs of a driven mixer, the same in one forward and decoded."""
    cache = mixer.new_cache(len(x), x.shape[1])
    y, parts = mixer(x), [mixer(part, cache=cache) for part in x.split([9, *[1] * 4, x.shape[1] - 13], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), y, rtol=1e-9, atol=1e-10)
    return y[..., : like[0, 0].numel()].reshape(like.shape)


def without(mixer: Mixer, *slots: str) -> Mixer:
    """Without the stages of some chains."""
    for slot in slots:
        setattr(mixer, slot, nn.ModuleList())
    return mixer


def conv(v: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """``(H, T, d)`` values, taps ``(H, d, n)``, bias ``(H, d)``: sums over the tokens before, by loops."""
    out, n = bias[:, None].expand_as(v).clone(), taps.shape[-1]
    for t in range(v.shape[1]):
        for m in range(n):
            if t - n + 1 + m >= 0:
                out[:, t] += taps[..., m] * v[:, t - n + 1 + m]
    return out


def prefix_rows(weights: Tensor, v: Tensor) -> Tensor:
    """``sum_(j <= t) weights[t, j] v_j``."""
    return torch.stack([weights[..., t, : t + 1].unsqueeze(-2) @ v[..., : t + 1, :]
                        for t in range(v.shape[-2])], dim=-3)[..., 0, :]  # fmt: skip


def tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (T, 16)), dtype=torch.float64)


def same(a: Tensor, b: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def turned(z: Tensor) -> Tensor:
    return torch.stack([rotate(head, 10000.0) for head in z])


def local(mixer: Mixer, v: Tensor) -> Tensor:
    """The convolution of the values, heads repeated."""
    stage = next(s for s in mixer.combine if type(s).__name__ == "LocalConv")
    heads, width = stage.v
    taps, bias = (z.expand(heads, *z.shape) if stage.shared else z for z in (stage.taps, stage.bias))
    taps, bias = taps.reshape(heads, width, -1), bias.reshape(heads, width)
    repeat = len(v) // heads
    return conv(v, taps.repeat_interleave(repeat, dim=0), bias.repeat_interleave(repeat, dim=0))


def gated(mixer: Mixer, x: Tensor, o: Tensor) -> Tensor:
    stage = next((s for s in mixer.combine if type(s).__name__ == "Gate"), None)
    if stage is None:
        return out_of(mixer, o)
    gate = x @ stage.gate.weight.T + stage.gate.bias
    return out_of(mixer, o * gate.reshape(len(x), len(o), -1).transpose(0, 1))


def elu1(z: Tensor) -> Tensor:
    return torch.where(z > 0, z + 1, z.exp())
