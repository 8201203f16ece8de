"""The scan's kernels against the recurrence in fp64."""

from __future__ import annotations

import pytest
import torch
from bounds import assert_within
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.scan import scan
from scans import CLASSES, make, runs, start

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not launch.has_triton(), reason="triton has no wheel here")
ONE_PER_KIND = ("scalar", "diagonal", "scalar-delta", "diagonal-delta", "diagonal-rank_one")


@pytest.fixture(autouse=True)
def poison(monkeypatch) -> None:
    import attnzoo_kernels.scan.driver as driver
    import attnzoo_kernels.scan.ops_step as step

    def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return like.new_full(shape, torch.nan, dtype=dtype)

    monkeypatch.setattr(driver, "empty", empty)
    monkeypatch.setattr(step, "empty", empty)


def operands(name: str, T: int, K: int, V: int, dtype: torch.dtype, B: int = 1) -> dict[str, Tensor]:
    """As `make`, with values that ``dtype`` (gates and states: fp32) holds exactly."""
    torch.manual_seed(T)
    x = make(name, B=B, T=T, H=2, K=K, V=V)
    x["initial_state"] = start(x)
    narrow = {n: t.to(dtype) if n in "qkvea" else t.float() for n, t in x.items()}
    return {n: t.double().to(DEVICE) for n, t in narrow.items()}


def compare(x: dict[str, Tensor], dtype: torch.dtype = torch.float32, **kwargs) -> None:
    """Outputs, final state and every gradient."""
    do, dS = torch.randn_like(x["v"]).to(dtype).double(), torch.randn_like(x["initial_state"])

    def run(double: bool, **more) -> dict[str, Tensor]:
        wide = {n: t if double else t.to(dtype if n in "qkvea" else torch.float32) for n, t in x.items()}
        leaves = {n: t.detach().clone().requires_grad_() for n, t in wide.items()}
        o, S = scan(**leaves, output_final_state=True, **kwargs, **more)
        grads = torch.autograd.grad((o.double() * do).sum() + (S.double() * dS).sum(), list(leaves.values()))
        return {"o": o, "S": S} | {f"d{n}": grad for n, grad in zip(leaves, grads, strict=True)}

    got, same = run(False, impl="triton"), run(False, impl="reference")
    exact = run(True, impl="reference", form="recurrent")
    # a gate's gradient is a sum over a head's width of terms that nearly cancel
    for name, value in exact.items():
        terms = (x["q"] * exact["dq"]).abs().amax().item() * x["q"].shape[1]
        # 16-bit operands are decayed, and matrices of pairs stored, in 16 bits before they are multiplied
        rough = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
        scale = max(value.abs().max().item(), terms if name == "dg" else 0.0)
        band = 4 * rough * scale + (terms * torch.finfo(torch.float32).eps if name == "dg" else 0.0)
        assert_within(name, got[name], same[name], value, band=band)


@pytest.mark.parametrize("name", CLASSES)
def test_documents_and_a_ragged_tail(name: str) -> None:
    compare(operands(name, 37, 16, 20, torch.float32, B=2), segments=runs(2, 37).to(DEVICE), chunk_size=16)


@pytest.mark.parametrize("name", ONE_PER_KIND)
@pytest.mark.parametrize(("T", "K", "V"), [(1, 16, 16), (5, 16, 8), (130, 24, 36), (64, 64, 64)])
def test_shapes(name: str, T: int, K: int, V: int) -> None:
    compare(operands(name, T, K, V, torch.float32))


@pytest.mark.parametrize("name", ["scalar", "scalar-delta", "scalar-rank_one"])
def test_wide_heads(name: str) -> None:
    compare(operands(name, 33, 128, 128, torch.float32))


@pytest.mark.parametrize("name", CLASSES)
def test_extreme_gates(name: str) -> None:
    """Gates of exactly 0 and 1 beside each other, and writes of full strength."""
    x = operands(name, 70, 16, 16, torch.float32)
    for key, full in (("g", 0.0), ("beta", 1.0)):
        if key in x:
            draw = torch.rand_like(x[key])
            x[key] = torch.where(draw < 0.2, full, x[key])
            x[key] = torch.where(draw > 0.8, -torch.inf if key == "g" else 0.0, x[key])
    if "g" in x:
        # the recurrence has no gradient at -inf: exp(-1000) is 0 as well
        x["g"] = x["g"].clamp(min=-1000)
    compare(x)


@pytest.mark.parametrize("name", ONE_PER_KIND)
def test_minus_infinity_forgets(name: str) -> None:
    x = {n: t.float() for n, t in operands(name, 40, 16, 16, torch.float32).items()}
    x["g"][:, 20] = -torch.inf
    o, _ = scan(**x, impl="triton")
    x["g"][:, 20] = -1000.0
    torch.testing.assert_close(o, scan(**x, impl="triton")[0])
    assert torch.isfinite(o).all()


@pytest.mark.parametrize("name", ONE_PER_KIND)
def test_bf16(name: str) -> None:
    compare(operands(name, 70, 32, 32, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("name", ["scalar", "diagonal-delta"])
def test_every_tile(name: str, monkeypatch) -> None:
    from attnzoo_kernels import aot

    most = max(len(kernel.tiles) for kernel in aot.kernels().values() if kernel.name.startswith("scan"))
    for i in range(most):
        monkeypatch.setattr(launch.tuner, "pick", lambda kernel, *_, i=i: kernel.tiles[i % len(kernel.tiles)])
        compare(operands(name, 40, 64, 64, torch.float32))


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_one_step_at_a_time(name: str) -> None:
    """Decoding token by token, through a document that begins, is the scan of all."""
    x = operands(name, 9, 24, 20, torch.float32, B=2)
    segments = torch.zeros(2, 9, dtype=torch.int64, device=DEVICE)
    segments[1, 5:] = 1
    exact, last = scan(**x, segments=segments, output_final_state=True, form="recurrent")
    state, parts = x.pop("initial_state").float(), []
    for t in range(9):
        now = {n: (z if z.dim() == 1 else z[:, t : t + 1]).float() for n, z in x.items()}
        # run 0 owns the state that it is given
        run = (segments[:, t : t + 1] != segments[:, max(t - 1, 0) : max(t, 1)]).long()
        o, state = scan(**now, initial_state=state, segments=run, output_final_state=True, impl="triton")
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double(), last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["constant", "diagonal-delta", "scalar-rank_one"])
def test_opcheck(name: str) -> None:
    from attnzoo_kernels.scan.ops_delta import scan_delta_backward, scan_delta_forward
    from attnzoo_kernels.scan.ops_plain import scan_plain_backward, scan_plain_forward
    from attnzoo_kernels.scan.ops_step import scan_step_kernel

    x = {n: t.float().requires_grad_() for n, t in operands(name, 9, 16, 16, torch.float32).items()}
    state, segments = x.pop("initial_state"), runs(1, 9).to(DEVICE)
    if x["g"].dim() == 1:
        x["g"] = x["g"].detach().expand(1, 9, 2).contiguous().requires_grad_()
    plain = [x[n] for n in "qkvg"]
    more = [x.get(n) for n in ("beta", "e", "a")]
    if any(z is not None for z in more):
        forward, backward, first = scan_delta_forward, scan_delta_backward, [*plain, *more]
    else:
        forward, backward, first = scan_plain_forward, scan_plain_backward, plain
    args = (*first, 0.25, state, segments, 16)
    checked = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(forward, args, test_utils=(*checked["test_utils"], "test_autograd_registration"))
    detached = [z.detach() if isinstance(z, Tensor) else z for z in args]
    grads = torch.ones_like(x["v"]), torch.ones_like(state)
    torch.library.opcheck(backward, (*grads, *detached), **checked)
    row = [None if z is None else z.detach()[:, 0] for z in (*plain, *more)]
    torch.library.opcheck(scan_step_kernel, (state.detach(), *row, 0.25, None), **checked)


def test_flops_are_those_of_the_chunks() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from attnzoo_kernels.scan import scan_flops

    for name, kind in (("diagonal", "diagonal"), ("scalar-delta", "delta")):
        x = {n: t.float() for n, t in operands(name, 70, 16, 16, torch.float32).items()}
        with FlopCounterMode(display=False) as counter:
            scan(**x, impl="triton")
        assert counter.get_total_flops() == scan_flops(kind, 70, 2, 16, 16, 64).executed


def test_refusals() -> None:
    x = {n: t.float() for n, t in operands("scalar", 4, 16, 16, torch.float32).items()}
    with pytest.raises(ValueError, match="form='chunked', got 'recurrent'"):
        scan(**x, form="recurrent", impl="triton")
    with pytest.raises(ValueError, match="fp32 and below, got float64"):
        scan(**{n: t.double() for n, t in x.items()}, impl="triton")
    wide = {n: t.float() for n, t in operands("scalar", 4, 300, 16, torch.float32).items()}
    with pytest.raises(ValueError, match="keys up to 256 wide, got 300"):
        scan(**wide, impl="triton")
