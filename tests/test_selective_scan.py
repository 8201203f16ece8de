"""The selective scan against a loop over tokens in fp64: values, gradients, documents, carried states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnzoo_kernels.selective_scan import selective_scan, stepped
from attnzoo_kernels.selective_scan.reference import CHUNK, SPAN

LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3, SPAN, 2 * SPAN + 5]
NAMES = ("u", "delta", "A", "B", "C", "initial_state")


def make(T: int, batch: int = 2, channels: int = 3, N: int = 4) -> dict[str, Tensor]:
    shapes = {"u": (batch, T, channels), "B": (batch, T, N), "C": (batch, T, N)}
    x = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    x["delta"] = torch.rand(batch, T, channels, dtype=torch.float64)
    x["A"] = -3 * torch.rand(channels, N, dtype=torch.float64)
    x["initial_state"] = torch.randn(batch, channels, N, dtype=torch.float64)
    return {name: x[name].requires_grad_() for name in NAMES}


def loop(u, delta, A, B, C, initial_state, segments=None) -> tuple[Tensor, Tensor]:
    rows, finals = [], []
    for b in range(len(u)):
        h, run, ys = initial_state[b], 0, []
        for t in range(u.shape[1]):
            if segments is not None and int(segments[b, t]) != run:
                h, run = torch.zeros_like(h), int(segments[b, t])
            h = torch.exp(delta[b, t, :, None] * A) * h + torch.outer(delta[b, t] * u[b, t], B[b, t])
            ys.append(h @ C[b, t])
        rows.append(torch.stack(ys))
        finals.append(h)
    return torch.stack(rows), torch.stack(finals)


def documents(T: int) -> Tensor:
    """Row 0 goes on in the carried document, row 1 starts another."""
    first = torch.zeros(T, dtype=torch.long)
    first[T // 3 :] += 1
    first[T // 3 + 1 :] += 1
    return torch.stack([first, torch.ones(T, dtype=torch.long) + (torch.arange(T) >= T - 2)])


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_equals_a_loop(T: int, impl: str) -> None:
    x = make(T)
    for segments in (None, documents(T)):
        probes = torch.randn_like(x["u"]), torch.randn_like(x["initial_state"])
        ours = selective_scan(**x, segments=segments, output_final_state=True, impl=impl)
        theirs = loop(**x, segments=segments)
        grads = []
        for y, h in (ours, theirs):
            total = (y * probes[0]).sum() + (h * probes[1]).sum()
            grads.append(torch.autograd.grad(total, list(x.values()), materialize_grads=True))
        for a, b in zip((*ours, *grads[0]), (*theirs, *grads[1]), strict=True):
            same(a, b)


def test_rows_go_in_groups_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows, two at a time: the last group is short."""
    monkeypatch.setattr(stepped, "ROOM", 2 * 3 * 4)
    x = make(2 * stepped.SPAN + 1, batch=5)
    found = []
    for impl in ("auto", "reference"):
        y, h = selective_scan(**x, output_final_state=True, impl=impl)
        found.append((y, h, *torch.autograd.grad((y.sin().sum() + h.cos().sum()), list(x.values()))))
    for a, b in zip(*found, strict=True):
        same(a, b)


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_two_calls_are_one(cut: int) -> None:
    x, segments = make(40), documents(40)
    y, h = selective_scan(**x, segments=segments, output_final_state=True)
    tokens = ("u", "delta", "B", "C")
    first = {n: v[:, :cut] if n in tokens else v for n, v in x.items()}
    y1, state = selective_scan(**first, segments=segments[:, :cut], output_final_state=True)
    later = {n: v[:, cut:] if n in tokens else v for n, v in x.items()} | {"initial_state": state}
    rest = segments[:, cut:] - segments[:, cut - 1 : cut]  # run 0 is what the state is of
    y2, state = selective_scan(**later, segments=rest, output_final_state=True)
    same(torch.cat([y1, y2], dim=1), y)
    same(state, h)


def test_a_padded_tail_leaves_the_state() -> None:
    x = make(12)
    whole = {n: v.detach().clone() for n, v in x.items()}
    whole["delta"][:, 9:] = 0
    short = {n: v[:, :9] if n in ("u", "delta", "B", "C") else v for n, v in whole.items()}
    padded, plain = (selective_scan(**z, output_final_state=True)[1] for z in (whole, short))
    same(padded, plain)


def test_golden() -> None:
    file = Path(__file__).parent / "golden" / "scan_e_selective.op.pt"
    golden = torch.load(file, weights_only=True)
    x = {name: value.requires_grad_() for name, value in golden["inputs"].items()}
    step = torch.nn.functional.softplus(x["delta_raw"] + x["delta_bias"])
    y, h = selective_scan(x["u"], step, x["A"], x["B"], x["C"], output_final_state=True)
    y = (y + x["D"] * x["u"]) * torch.nn.functional.silu(x["z"])
    same(y, golden["outputs"]["y"])
    same(h.mT, golden["outputs"]["h"])
    grads = dict(golden["grads"])
    found = torch.autograd.grad(y, list(x.values()), grads.pop("do"))
    for name, grad in zip(x, found, strict=True):
        same(grad, grads[f"d{name}"])


def test_extreme_decays_stay_finite() -> None:
    x = {n: v.detach().float() for n, v in make(50).items()}
    x["delta"] = x["delta"] * 1e4
    x["A"] = x["A"] * 1e4
    x = {n: v.requires_grad_() for n, v in x.items()}
    y, h = selective_scan(**x, output_final_state=True)
    grads = torch.autograd.grad(y.sum() + h.sum(), list(x.values()))
    assert all(bool(z.isfinite().all()) for z in (y, h, *grads))


def test_bf16_inputs_run_in_fp32() -> None:
    x = {n: v.detach().bfloat16() for n, v in make(70).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, h = selective_scan(**x, output_final_state=True)
    want, state = loop(**{n: v.double() for n, v in x.items()})
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    torch.testing.assert_close(h.double(), state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"delta": torch.ones(2, 5, 4)}, r"delta: needs shape \(2, 5, 3\)"),
        ({"A": torch.ones(4, 4)}, r"A: needs shape \(3, 4\)"),
        ({"B": torch.ones(2, 5, 3)}, r"B: needs shape \(2, 5, 4\)"),
        ({"initial_state": torch.ones(2, 4, 3)}, r"initial_state: needs shape \(2, 3, 4\)"),
        ({"segments": torch.ones(2, 5)}, r"segments: needs int64 \(2, 5\)"),
        ({"impl": "triton"}, r"impl: needs one of auto, reference, got 'triton'"),
        ({"u": torch.ones(2, 5)}, r"u: needs 3 axes"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**{n: v.detach().float() for n, v in make(5).items()} | change)
