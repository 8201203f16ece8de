"""The plain scan's custom op against the recurrence, spelled out token by token in fp64."""

from __future__ import annotations

import pytest
import torch
from bounds import assert_within
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.scan import scan, scan_flops
from scans import make, start

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not launch.has_triton(), reason="triton has no wheel here")
CLASSES = ("none", "scalar", "diagonal")


@pytest.fixture(autouse=True)
def poison(monkeypatch) -> None:
    import attnzoo_kernels.scan.driver as driver

    def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return like.new_full(shape, torch.nan, dtype=dtype)

    monkeypatch.setattr(driver, "empty", empty)


def operands(name: str, B: int, T: int, K: int, V: int, H: int = 2) -> dict[str, Tensor]:
    """fp64 operands that fp32 holds exactly."""
    torch.manual_seed(T + K)
    x = make(name, B=B, T=T, H=H, K=K, V=V)
    x["state"] = start(x)
    return {n: t.float().double().to(DEVICE) for n, t in x.items()}


def loop(q, k, v, state, g=None, *, scale: float, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t; S is zero where a run beside 0 begins."""
    out, before = [], torch.zeros_like(q[:, 0, 0, 0], dtype=torch.int64)
    for t in range(q.shape[1]):
        if segments is not None:
            kept = (segments[:, t] == before).to(state.dtype)
            state, before = state * kept[:, None, None, None], segments[:, t]
        if g is not None:
            decay = g[:, t].exp()
            state = state * (decay[..., None] if g.dim() == 4 else decay[..., None, None])
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(out, 1), state


def gradients(run, x: dict[str, Tensor], do: Tensor, dS: Tensor) -> dict[str, Tensor]:
    leaves = {n: t.detach().clone().requires_grad_() for n, t in x.items()}
    o, S = run(**leaves)
    grads = torch.autograd.grad((o.double() * do).sum() + (S.double() * dS).sum(), list(leaves.values()))
    return {"o": o, "S": S} | {f"d{n}": grad for n, grad in zip(leaves, grads, strict=True)}


def compare(x: dict[str, Tensor], segments: Tensor | None = None, chunk_size: int = 64) -> None:
    """Outputs, final state and every gradient."""
    from attnzoo_kernels.scan.ops_plain import scan_plain

    scale = 0.3

    def kernels(q, k, v, state, g=None) -> tuple[Tensor, Tensor]:
        return scan_plain(q, k, v, g, scale, state, segments, chunk_size)

    def chunked(q, k, v, state, g=None) -> tuple[Tensor, Tensor]:
        return scan(
            q, k, v, g, scale=scale, initial_state=state, segments=segments, chunk_size=chunk_size,
            output_final_state=True, impl="reference",
        )  # fmt: skip

    do, dS = torch.randn_like(x["v"]), torch.randn_like(x["state"])
    narrow = {n: t.float() for n, t in x.items()}
    exact = gradients(lambda **y: loop(**y, scale=scale, segments=segments), x, do, dS)
    got, same = gradients(kernels, narrow, do, dS), gradients(chunked, narrow, do, dS)
    # a gate's gradient is a sum over a head's width of terms that nearly cancel
    terms = (x["q"] * exact["dq"]).abs().amax().item() * x["q"].shape[1] * torch.finfo(torch.float32).eps
    for name, value in exact.items():
        assert_within(name, got[name], same[name], value, band=terms if name == "dg" else 0.0)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("K", "V"), [(256, 16), (20, 80), (80, 132)])
def test_widths_that_take_several_blocks(name: str, K: int, V: int) -> None:
    compare(operands(name, 1, 19, K, V, H=1), chunk_size=16)


@pytest.mark.parametrize("name", CLASSES)
def test_documents_that_begin_at_chunks(name: str) -> None:
    """One row begins in a run that does not own the state; others change run at, before and after an edge."""
    segments = torch.zeros(4, 49, dtype=torch.int64)
    segments[0] = 3
    for row, edge in ((1, 16), (2, 31), (3, 33)):
        segments[row, edge:] = 2
    compare(operands(name, 4, 49, 16, 16, H=1), segments.to(DEVICE), chunk_size=16)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("size", [1, 16, 40, 1000])
def test_chunk_sizes(name: str, size: int) -> None:
    compare(operands(name, 1, 67, 16, 16, H=1), chunk_size=size)


@pytest.mark.parametrize("name", CLASSES)
def test_strides(name: str) -> None:
    """Operands, documents and gradients that are not contiguous."""
    from attnzoo_kernels.scan.ops_plain import scan_plain

    x = {n: t.float() for n, t in operands(name, 2, 18, 16, 16).items()}
    segments = torch.arange(18, device=DEVICE)[None].expand(2, 18) // 7
    apart = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in x.items()}
    assert not apart["q"].is_contiguous()
    do = torch.randn(16, 18, 2, 2, device=DEVICE).transpose(0, -1)
    call = lambda q, k, v, state, g=None: scan_plain(q, k, v, g, 0.3, state, segments, 16)  # noqa: E731
    first, second = (gradients(call, y, do, torch.ones_like(x["state"])) for y in (x, apart))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", CLASSES)
def test_every_plain_tile(name: str, monkeypatch) -> None:
    from attnzoo_kernels.scan import kernel_plain_gradients, kernel_plain_states

    most = max(len(kernel.tiles) for kernel in kernel_plain_states.KERNELS + kernel_plain_gradients.KERNELS)
    for i in range(most):
        monkeypatch.setattr(launch.tuner, "pick", lambda kernel, *_, i=i: kernel.tiles[i % len(kernel.tiles)])
        compare(operands(name, 1, 20, 80, 80, H=1), chunk_size=16)


@pytest.mark.parametrize("name", CLASSES)
def test_opcheck(name: str) -> None:
    from attnzoo_kernels.scan.ops_plain import scan_plain_backward, scan_plain_forward

    x = {n: t.float().requires_grad_() for n, t in operands(name, 1, 9, 16, 16).items()}
    tail = (0.25, x["state"], torch.arange(9, device=DEVICE)[None] // 5, 16)
    args = (x["q"], x["k"], x["v"], x.get("g"), *tail)
    checked = ("test_schema", "test_faketensor")
    torch.library.opcheck(scan_plain_forward, args, test_utils=(*checked, "test_autograd_registration"))
    detached = [z.detach() if isinstance(z, Tensor) else z for z in args]
    grads = torch.ones_like(detached[2]), torch.ones_like(detached[5])
    torch.library.opcheck(scan_plain_backward, (*grads, *detached), test_utils=checked)


@pytest.mark.parametrize(
    ("name", "kind"), [("none", "scalar"), ("scalar", "scalar"), ("diagonal", "diagonal")]
)
def test_flops_of_both_passes(name: str, kind: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from attnzoo_kernels.scan.ops_plain import scan_plain

    x = {n: t.float().requires_grad_() for n, t in operands(name, 2, 20, 16, 16).items()}
    with FlopCounterMode(display=False) as counter:
        o, _ = scan_plain(x["q"], x["k"], x["v"], x.get("g"), 0.3, x["state"], None, 16)
        o.sum().backward()
    assert counter.get_total_flops() == 4 * 2 * scan_flops(kind, 20, 2, 16, 16, 16).executed
