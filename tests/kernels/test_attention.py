"""Attention with a choice of normaliser: the reference against a loop, the kernels against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from bounds import assert_within
from torch import Tensor

from attnzoo_kernels import launch, rows
from attnzoo_kernels.attention import NORMALISERS, attention
from attnzoo_kernels.span import Span

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not launch.has_triton(), reason="triton has no wheel here")
# the interpreter computes hidden scores before it hides them
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


def documents(T: int, *starts: int, padding: int = 0) -> tuple[Tensor, Tensor]:
    """first and own (2,T): these documents in row 0, one in row 1 with a tail of padding."""
    own = torch.arange(T, dtype=torch.int32, device=DEVICE).repeat(2, 1)
    first = torch.zeros_like(own)
    for start in starts:
        first[0, start:] = start
    own[1, T - padding :] = -1
    return first, own


SPANS = {
    "causal": Span.causal(37, 37, torch.device(DEVICE)),
    "documents": Span(*documents(37, 5, 6, 22, padding=4)),
    "window": Span(*documents(37, 5, 22, padding=4), window=7),
    "sinks": Span(*documents(37, 5, 22, padding=4), window=7, n_sink=3),
    "nothing": Span(*documents(37, padding=37)),
}
OPTIONS = {
    "softmax": {},
    "softmax_sink": {"normaliser": "softmax", "sink": draw(4, seed=9)},
    "softmax_off_by_one": {"normaliser": "softmax", "sink": "off_by_one"},
    "signed": {},
    "clipped_softmax": {"clip": (-0.05, 1.1)},
    "sigmoid": {"bias": draw(4, seed=8)},
    "relu": {"bias": draw(4, seed=8)},
    "softplus_l1": {},
}


def options(name: str, **more: object) -> dict:
    return {"normaliser": name, **OPTIONS[name], **more}


def operands(B: int = 2, H: int = 4, G: int = 2, T: int = 37, S: int = 37, d: int = 16, d_v: int = 8):
    return [draw(B, H, T, d), draw(B, G, S, d, seed=1), draw(B, G, S, d_v, seed=2)]


def by_loop(q: Tensor, k: Tensor, v: Tensor, span: Span, *, normaliser, scale, bias=None, sink=None,
            clip=(0.0, 1.0), cap=None, slopes=None) -> Tensor:  # fmt: skip
    (B, H, T, _), group = q.shape, q.shape[1] // k.shape[1]
    o = q.new_zeros(*q.shape[:3], v.shape[-1])
    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(T)):
        first, own = (int(x[b if x.shape[0] > 1 else 0, t]) for x in (span.first, span.own))
        keys = [
            j for j in range(first, own + 1)
            if span.window is None or own - j < span.window or j - first < span.n_sink
        ]  # fmt: skip
        s = [scale * float(q[b, h, t] @ k[b, h // group, j]) for j in keys]
        s = s if cap is None else [cap * math.tanh(x / cap) for x in s]
        s = s if slopes is None else [x - float(slopes[h]) * (own - j) for x, j in zip(s, keys, strict=True)]
        s = s if bias is None else [x + float(bias[h]) for x in s]
        e = [math.exp(abs(x) if normaliser == "signed" else x) for x in s]
        rest = 0.0 if sink is None else 1.0 if isinstance(sink, str) else math.exp(float(sink[h]))
        p = [x / (sum(e) + rest) for x in e]
        w = {
            "softmax": lambda p=p: p,
            "signed": lambda p=p, s=s: [math.copysign(x, y) for x, y in zip(p, s, strict=True)],
            "clipped_softmax": lambda p=p: [min(max((clip[1] - clip[0]) * x + clip[0], 0), 1) for x in p],
            "sigmoid": lambda s=s: [1 / (1 + math.exp(-x)) for x in s],
            "relu": lambda s=s: [max(x, 0.0) for x in s],
            "softplus_l1": lambda s=s: [
                math.log1p(math.exp(x)) / sum(math.log1p(math.exp(y)) for y in s) for x in s
            ],
        }[normaliser]()
        for x, j in zip(w, keys, strict=True):
            o[b, h, t] += x * v[b, h // group, j]
    return o


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("span", ["documents", "sinks"])
def test_reference_matches_loop(name: str, span: str, monkeypatch) -> None:
    monkeypatch.setattr(rows, "ROWS", 16)  # several runs of them
    given = options(name, scale=0.4, cap=1.5, slopes=draw(4, seed=7).abs())
    if name == "softmax":
        given |= {"cap": None, "slopes": None}
    q, k, v = operands()
    torch.testing.assert_close(
        attention(q, k, v, SPANS[span], **given), by_loop(q, k, v, SPANS[span], **given)
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck_of_the_reference(name: str) -> None:
    leaves = [x.requires_grad_() for x in operands(B=2, T=5, S=5, d=3, d_v=2)]
    given = options(name)
    extra = next((key for key in ("sink", "bias") if isinstance(given.get(key), Tensor)), None)
    if extra:
        leaves.append(given.pop(extra).clone().requires_grad_())
    span = Span(*documents(5, 2, padding=2))

    def run(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        lse = name in ("softmax", "signed")
        out = attention(q, k, v, span, **given, **({extra: more[0]} if extra else {}), return_lse=lse)
        return (out[0], out[1].masked_fill(out[1] == -torch.inf, 0.0)) if lse else out

    assert torch.autograd.gradcheck(run, leaves)


def test_long_rows_of_the_reference_recompute() -> None:
    """The backward of recomputed runs of rows is that of kept ones."""
    q, k, v = (x.requires_grad_() for x in operands(T=37))
    found = []
    for least in (1, 1 << 20):
        rows.LEAST_RECOMPUTED, kept = least, rows.LEAST_RECOMPUTED
        o = attention(q, k, v, SPANS["sinks"])
        rows.LEAST_RECOMPUTED = kept
        found.append([o, *torch.autograd.grad(o.square().sum(), (q, k, v))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def poison(monkeypatch) -> None:
    import attnzoo_kernels.attention.ops as ops

    monkeypatch.setattr(
        ops, "_empty", lambda like, shape, dtype: like.new_full(shape, torch.nan, dtype=dtype)
    )


def compare(given: list[Tensor], span: Span, dtype: torch.dtype = torch.float32, **kwargs) -> None:
    """Values, log-sum-exps and every gradient, of kernels and reference."""
    lse = kwargs.get("normaliser", "softmax") in ("softmax", "signed")
    do, dlse = draw(*given[0].shape[:3], given[2].shape[-1], seed=5), draw(*given[0].shape[:3], seed=6)
    low = [x.to(dtype) for x in given]

    def run(impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in low]
        more = dict(kwargs)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for key in ("sink", "bias"):
            if isinstance(more.get(key), Tensor):
                more[key] = more[key].to(torch.float32).to(wide).requires_grad_()
                leaves.append(more[key])
        out = attention(*leaves[:3], span, impl=impl, return_lse=lse, **more)
        o, l = out if lse else (out, None)
        loss = (o * do.to(low[0].dtype).to(o.dtype)).sum()
        names = ["q", "k", "v", "extra"][: len(leaves)]
        result = {"o": o}
        if lse:
            result["lse"] = l.masked_fill(l == -torch.inf, 0.0)
            loss = loss + (result["lse"] * dlse.to(l.dtype)).sum()
        grads = torch.autograd.grad(loss, leaves)
        return result | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}

    got, same, exact = run("triton", dtype), run("reference", dtype), run("reference", torch.float64)
    for name in exact:
        assert_within(name, got[name], same[name], exact[name])


@needs_triton
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("span", SPANS)
def test_spans(poison, name: str, span: str) -> None:
    compare(operands(), SPANS[span], **options(name))


@needs_triton
@pytest.mark.parametrize("name", OPTIONS)
def test_several_tiles_with_cap_and_slopes(poison, name: str) -> None:
    span = Span(*documents(150, 60, 61, 100, padding=9), window=40, n_sink=2)
    given = operands(T=150, S=150)
    compare(given, span, **options(name, scale=0.3, cap=2.0, slopes=draw(4, seed=7).abs().float()))


@needs_triton
@pytest.mark.parametrize(
    ("H", "G", "T", "S", "d", "d_v"),
    [(1, 1, 1, 1, 16, 16), (2, 1, 1, 130, 64, 32), (6, 2, 70, 150, 20, 12), (2, 2, 65, 65, 32, 64),
     (2, 1, 70, 70, 128, 128), (1, 1, 40, 70, 192, 160)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["softmax_sink", "signed", "clipped_softmax", "sigmoid"])
def test_shapes(poison, name: str, H: int, G: int, T: int, S: int, d: int, d_v: int) -> None:
    more = options(name)
    more |= {key: more[key][:1].repeat(H) for key in ("sink", "bias") if isinstance(more.get(key), Tensor)}
    span = Span.causal(T, S, torch.device(DEVICE))
    compare(operands(1, H, G, T, S, d, d_v), span, **more)


@needs_triton
@pytest.mark.parametrize("name", NORMALISERS)
def test_bf16(poison, name: str) -> None:
    compare(operands(T=70, S=70, d=32), Span(*documents(70, 33, padding=3)), torch.bfloat16, normaliser=name)


@needs_triton
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [0.0, 1e-6, 30.0])
def test_extreme_scores(poison, name: str, size: float) -> None:
    q, k, v = operands(T=40, S=40)
    compare([size * q, k, v], Span.causal(40, 40, torch.device(DEVICE)), **options(name))


@needs_triton
def test_every_tile(poison, monkeypatch) -> None:
    from attnzoo_kernels.attention import kernel_backward, kernel_forward

    span = Span(*documents(150, 60, 61, padding=9), window=70, n_sink=2)
    for by_width in (kernel_forward.FORWARD, kernel_backward.QUERIES, kernel_backward.KEYS):
        for tile in [tile for kernel in by_width.values() for tile in kernel.tiles]:
            pick = lambda kernel, *_, own=by_width, tile=tile: (  # noqa: E731
                tile if kernel in own.values() else kernel.tiles[0]
            )
            monkeypatch.setattr(launch.tuner, "pick", pick)
            compare(operands(1, 2, 1, 150, 150), Span(span.first[:1], span.own[:1], 70, 2))


@needs_triton
def test_strides(poison) -> None:
    """Operands as projections leave them, (B,T,H,d) transposed, and keys in a longer cache."""
    q, k, v = (x.float() for x in operands(T=30, S=40))
    span = Span.causal(30, 40, torch.device(DEVICE))
    cache = [torch.full((2, 50, 2, x.shape[-1]), torch.nan, device=DEVICE) for x in (k, v)]
    for to, x in zip(cache, (k, v), strict=True):
        to[:, :40] = x.transpose(1, 2)
    turned = [q.transpose(1, 2).contiguous().transpose(1, 2), *(x[:, :40].transpose(1, 2) for x in cache)]
    plain = attention(q, k, v, span, impl="triton")
    assert torch.equal(attention(*turned, span, impl="triton"), plain)
    scattered = [x.mT.contiguous().mT for x in (q, k, v)]
    assert torch.equal(attention(*scattered, span, impl="triton"), plain)


def test_identities() -> None:
    q, k, v = operands()
    span, run = SPANS["sinks"], attention
    plain = run(q, k, v, span)
    torch.testing.assert_close(run(q, k, v, span, normaliser="clipped_softmax"), plain)
    torch.testing.assert_close(run(q, k, v, span, sink=torch.full((4,), -1e4).double().to(DEVICE)), plain)
    off = torch.zeros(4, device=DEVICE).double()
    torch.testing.assert_close(run(q, k, v, span, sink="off_by_one"), run(q, k, v, span, sink=off))
    torch.testing.assert_close(
        run(-q, k, v, span, normaliser="signed"), -run(q, k, v, span, normaliser="signed")
    )
    positive = run(q.abs(), k.abs(), v, span, normaliser="signed")
    torch.testing.assert_close(positive, run(q.abs(), k.abs(), v, span))
    o, lse = run(q, k, v, span, return_lse=True)
    halves = [run(q, k, v, Span(span.first, span.own), return_lse=True)[1] >= lse - 1e-9]
    assert halves[0].all() and torch.equal(o, plain)


@needs_triton
@pytest.mark.parametrize("name", ["softmax_sink", "sigmoid", "clipped_softmax"])
def test_opcheck(name: str) -> None:
    from attnzoo_kernels.attention.ops import attention_backward, attention_forward

    given = options(name)
    q, k, v = (x.float().requires_grad_() for x in operands(T=9, S=9))
    bias, sink = (
        None if given.get(x) is None else given[x].float().requires_grad_() for x in ("bias", "sink")
    )
    first, own = documents(9, 4, padding=2)
    args = (q, k, v, own, first, bias, sink, None, 5, 1, given["normaliser"], 0.25, -0.05, 1.1, 0.0)
    torch.library.opcheck(attention_forward, args)
    o, saved = (x.detach() for x in attention_forward(*args))
    plain = [x.detach() for x in (q, k, v)]
    bias = None if bias is None else bias.detach()
    options_ = args[8:]
    torch.library.opcheck(
        attention_backward,
        (torch.ones_like(o), None, o, saved, *plain, own, first, bias, None, *options_),
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_triton
def test_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = (x.float().requires_grad_() for x in operands(T=20, S=20))
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, Span.causal(20, 20, torch.device(DEVICE)), impl="triton").sum().backward()
    pairs = 2 * 4 * 20 * 21 // 2
    assert counter.get_total_flops() == pairs * 2 * (16 + 8) + pairs * 2 * (4 * 16 + 3 * 8)


def test_work_under_a_window_is_linear() -> None:
    """The reference multiplies O(T window) pairs."""
    from torch.utils.flop_counter import FlopCounterMode

    found = []
    for T in (4096, 8192):
        q, k, v = (torch.randn(1, 1, T, 16, device=DEVICE) for _ in range(3))
        with FlopCounterMode(display=False) as counter:
            attention(q, k, v, Span.causal(T, T, torch.device(DEVICE), window=64), impl="reference")
        found.append(counter.get_total_flops())
    assert found[1] <= 2.1 * found[0] < 4096**2 * 64 / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 16)}, "q: needs shape"),
        ({"k": torch.zeros(1, 2, 9, 8)}, "k: needs shape"),
        ({"v": torch.zeros(1, 2, 8, 16)}, "v: needs shape"),
        ({"k": torch.zeros(1, 3, 9, 16), "v": torch.zeros(1, 3, 9, 16)}, "k: its heads must divide"),
        ({"v": torch.zeros(1, 2, 9, 16).half()}, "v: needs q's dtype"),
        ({"q": torch.zeros(1, 4, 9, 16).int()}, "q: needs a floating-point dtype"),
        ({"normaliser": "sparsemax"}, "normaliser: needs one of softmax"),
        ({"bias": 1.0}, "bias: only sigmoid and relu"),
        ({"normaliser": "sigmoid", "bias": torch.zeros(3)}, "bias: needs shape"),
        ({"sink": "two"}, "sink: needs one of off_by_one"),
        ({"sink": torch.zeros(3)}, "sink: needs shape"),
        ({"sink": "off_by_one", "normaliser": "relu"}, "sink: only softmax"),
        ({"clip": (0.1, 1.0)}, "clip: needs"),
        ({"cap": 0.0}, "cap: must be above 0"),
        ({"slopes": torch.zeros(2)}, "slopes: needs shape"),
        ({"normaliser": "relu", "return_lse": True}, "return_lse: 'relu' has no"),
        ({"span": Span(torch.zeros(1, 9), torch.zeros(1, 9))}, "span.first: needs int32"),
        ({"impl": "flash"}, "impl: needs one of"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    x = torch.zeros(1, 2, 9, 16)
    good = {"q": torch.zeros(1, 4, 9, 16), "k": x, "v": x, "span": Span.causal(9, 9, torch.device("cpu"))}
    with pytest.raises(ValueError, match=message):
        attention(**(good | change))


@needs_triton
def test_widest_refusal() -> None:
    x = torch.zeros(1, 1, 3, 300, device=DEVICE)
    with pytest.raises(ValueError, match="widths go up to 256"):
        attention(x, x, x, Span.causal(3, 3, torch.device(DEVICE)), impl="triton")
