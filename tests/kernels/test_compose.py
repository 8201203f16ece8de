"""Mixing across heads: the reference against loops and the mechanism, the kernels against the reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from bounds import assert_within
from torch import Tensor

import attnzoo
from attnzoo_kernels import launch, rows
from attnzoo_kernels.compose import Mix, compose
from attnzoo_kernels.span import Span

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(not launch.has_triton(), reason="triton has no wheel here")
NAMES = ("q", "k", "v", "pre.static", "pre.query", "pre.key", "post.static", "post.query", "post.key")


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


def make(B: int, H: int, T: int, S: int, d: int, d_v: int, pre: str, post: str, rank: int = 2) -> list:
    """q, k, v and the parts of both mixes; pre and post spell theirs: s(tatic), q(uery), k(ey)."""
    shapes = [(H, H), (B, 2 * rank + 1, T, H), (B, 2 * rank + 1, S, H)]
    operands = [draw(B, H, T, d), draw(B, H, S, d, seed=1), draw(B, H, S, d_v, seed=2)]
    for i, parts in enumerate((pre, post)):
        for j, (part, shape) in enumerate(zip("sqk", shapes, strict=True)):
            operands.append(0.4 * draw(*shape, seed=3 + 3 * i + j) if part in parts else None)
    return operands


def span_of(B: int, T: int, S: int, kind: str) -> Span:
    window, n_sink = {"window": (9, None), "sinks": (7, 2)}.get(kind, (None, None))
    span = Span.causal(T, S, DEVICE, window, n_sink or 0)
    if kind in ("causal", "window"):
        return span
    first = torch.zeros(B, T, dtype=torch.int32, device=DEVICE)
    own = span.own.repeat(B, 1)
    first[-1, T // 3 :] = S - T + T // 3
    first[0, T // 2 + 1 :] = S - T + T // 2 + 1
    own[0, -2:] = -1
    return Span(first, own, span.window, span.n_sink)


def call(operands: list, span: Span, impl: str) -> Tensor:
    q, k, v, *maps = operands
    mixes = [None if all(x is None for x in part) else Mix(*part) for part in (maps[:3], maps[3:])]
    return compose(q, k, v, span, pre=mixes[0], post=mixes[1], scale=q.shape[-1] ** -0.5, impl=impl)


def run(impl: str, operands: list, span: Span, dtype: torch.dtype, weight: Tensor) -> dict[str, Tensor]:
    operands = [None if x is None else x.to(dtype).requires_grad_() for x in operands]
    o = call(operands, span, impl)
    given = {name: x for name, x in zip(NAMES, operands, strict=True) if x is not None}
    grads = torch.autograd.grad(o, list(given.values()), weight.to(dtype))
    return {"o": o.detach()} | dict(zip(given, grads, strict=True))


def compare(operands: list, span: Span, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Operands are rounded to the dtype first, for fp64 too."""
    operands = [None if x is None else x.to(dtype).double() for x in operands]
    weight = draw(*operands[0].shape[:3], operands[2].shape[-1], seed=11).to(dtype)
    got = run("triton", operands, span, dtype, weight)
    same = run("reference", operands, span, dtype, weight)
    exact = run("reference", operands, span, torch.float64, weight)
    for name in exact:
        assert got[name].dtype == dtype
        assert_within(name, got[name], same[name], exact[name])
    return got


def by_pairs(operands: list, span: Span, scale: float) -> Tensor:
    """One pair of tokens after another, as arXiv 2405.08553 writes it."""
    q, k, v, *maps = operands
    (B, H, T, _), S = q.shape, k.shape[2]
    seen = span.visible(S).expand(B, 1, T, S)[:, 0]
    o = q.new_zeros(B, H, T, v.shape[-1])

    def mixed(a: Tensor, parts: list, b: int, t: int, j: int) -> Tensor:
        static, query, key = parts
        out = a.clone()
        if static is not None:
            out += a @ static
        for maps in ([] if query is None else [query[b, :, t]]) + ([] if key is None else [key[b, :, j]]):
            rank = len(maps) // 2
            for i in range(rank):
                out += (a @ maps[i]) * maps[rank + i]
            out += a * maps[-1]
        return out

    for b in range(B):
        for t in range(T):
            keys = [j for j in range(S) if seen[b, t, j]]
            if not keys:
                continue
            s = [mixed(scale * (q[b, :, t] * k[b, :, j]).sum(-1), maps[:3], b, t, j) for j in keys]
            p = torch.stack(s).exp()
            p = p / p.sum(0)
            o[b, :, t] = sum(mixed(p[n], maps[3:], b, t, j)[:, None] * v[b, :, j] for n, j in enumerate(keys))
    return o


@pytest.mark.parametrize(("pre", "post"), [("sqk", "sqk"), ("s", "s"), ("q", "k"), ("", "q"), ("k", "")])
def test_reference_matches_pairs(pre: str, post: str) -> None:
    operands, span = make(2, 3, 7, 9, 4, 5, pre, post), span_of(2, 7, 9, "sinks")
    o = call(operands, span, "reference")
    torch.testing.assert_close(o, by_pairs(operands, span, 0.5), rtol=0, atol=1e-12)
    assert (o[0, :, -2:] == 0).all()


@pytest.mark.parametrize("options", [{}, {"static_proj": False}, {"query_wise": False}, {"key_wise": False}])
def test_reference_is_what_dcmha_computes(options: dict) -> None:
    B, H, T, d = 2, 4, 11, 8
    torch.manual_seed(0)
    score = attnzoo.create("dcmha", dim=32, num_heads=H, **options).double().to(DEVICE).score
    for parameter in score.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rows = SimpleNamespace(x=draw(B, T, 32, seed=8), mem=SimpleNamespace(rows=lambda name, maps: maps))
    score.begin(rows)
    q, k, v = (draw(B, H, T, d, seed=i) for i in range(3))
    span = span_of(B, T, T, "documents")
    geo = SimpleNamespace(keys=SimpleNamespace(k=k), visible=span.visible(T), rows=slice(None), cols=None)
    from attnzoo.ops.attention import softmax

    exact = score.weights(softmax(score(q, geo), geo.visible), geo) @ v
    mixes = [
        Mix(
            getattr(score, f"W_b_{stage}", None),
            score.maps.get((stage, "query")),
            score.maps.get((stage, "key")),
        )
        for stage in ("pre", "post")
    ]
    o = compose(q, k, v, span, pre=mixes[0], post=mixes[1], scale=score.dot.scale, impl="reference")
    torch.testing.assert_close(o, exact, rtol=0, atol=1e-12)


def test_gradcheck_of_the_reference() -> None:
    operands, span = make(1, 2, 4, 5, 3, 2, "sqk", "sqk", rank=1), span_of(1, 4, 5, "documents")
    operands = [x.requires_grad_() for x in operands]
    assert torch.autograd.gradcheck(lambda *x: call(list(x), span, "reference"), operands)


def test_reference_in_chunks(monkeypatch) -> None:

    operands, span = make(2, 3, 37, 37, 4, 4, "sqk", "sqk"), span_of(2, 37, 37, "documents")
    whole = run("reference", operands, span, torch.float64, draw(2, 3, 37, 4, seed=11))
    monkeypatch.setattr(rows, "ROWS", 5)
    monkeypatch.setattr(rows, "LEAST_RECOMPUTED", 37)
    parts = run("reference", operands, span, torch.float64, draw(2, 3, 37, 4, seed=11))
    for name, x in whole.items():
        torch.testing.assert_close(parts[name], x, rtol=0, atol=1e-11)


def test_reference_in_bounded_memory() -> None:
    """2048 tokens keep no table of weights for the backward."""
    operands = [
        None if x is None else x.float().requires_grad_() for x in make(1, 2, 2048, 2048, 4, 4, "s", "k")
    ]
    largest = []

    def keep(x: Tensor) -> Tensor:
        largest.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        call(operands, Span.causal(2048, 2048, DEVICE), "reference")
    assert sum(largest) < 2048 * 2048 / 4


@pytest.fixture
def poison(monkeypatch) -> None:
    import attnzoo_kernels.compose.chunks as chunks
    import attnzoo_kernels.compose.ops as ops

    for module in (chunks, ops):
        monkeypatch.setattr(
            module, "_empty", lambda like, shape, dtype: like.new_full(shape, torch.nan, dtype=dtype)
        )


@needs_triton
@pytest.mark.parametrize(
    ("shape", "kind", "pre", "post"),
    [
        ((2, 4, 19, 19, 16, 32), "documents", "sqk", "sqk"),
        ((2, 3, 5, 70, 32, 16), "causal", "sqk", "sqk"),
        ((1, 16, 3, 67, 64, 64), "window", "qk", "qk"),
        ((2, 3, 21, 37, 16, 16), "sinks", "s", "s"),
        ((2, 2, 9, 9, 16, 16), "documents", "q", "k"),
        ((1, 2, 9, 40, 16, 8), "causal", "k", ""),
        ((1, 5, 6, 6, 8, 16), "causal", "", "s"),
        ((2, 2, 1, 33, 128, 128), "causal", "sq", "qk"),
        ((1, 1, 1, 1, 16, 16), "causal", "sqk", "sqk"),
    ],
)
def test_kernels(poison, shape: tuple[int, ...], kind: str, pre: str, post: str) -> None:
    B, _, T, S, _, _ = shape
    span = span_of(B, T, S, kind)
    got = compare(make(*shape, pre, post), span)
    empty = (span.own < span.first).expand(B, T)
    assert (got["o"].transpose(1, 2)[empty] == 0).all()
    assert (got["q"].transpose(1, 2)[empty] == 0).all()


@needs_triton
def test_plain_attention(poison) -> None:
    compare(make(1, 2, 9, 9, 16, 16, "", ""), span_of(1, 9, 9, "causal"))


@needs_triton
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_ranks(poison, rank: int) -> None:
    compare(make(1, 3, 6, 11, 16, 16, "qk", "sk", rank=rank), span_of(1, 6, 11, "causal"))


@needs_triton
@pytest.mark.parametrize("kind", ["documents", "sinks"])
def test_several_chunks(poison, monkeypatch, kind: str) -> None:
    """Rows of the workspace are few: sums over chunks, the last of them shorter."""
    import attnzoo_kernels.compose.chunks as chunks

    monkeypatch.setattr(chunks, "WORKSPACE", 0)
    compare(make(2, 3, 37, 40, 16, 16, "sqk", "s"), span_of(2, 37, 40, kind))


@needs_triton
@pytest.mark.parametrize("tile", [1, 2])
def test_other_tiles(poison, monkeypatch, tile: int) -> None:
    monkeypatch.setattr(
        launch.tuner, "pick", lambda kernel, *_: kernel.tiles[min(tile, len(kernel.tiles) - 1)]
    )
    compare(make(1, 3, 20, 90, 16, 16, "sqk", "sqk"), span_of(1, 20, 90, "sinks"))


@needs_triton
@pytest.mark.parametrize(("window", "n_sink"), [(None, 0), (7, 20), (30, 0)])
def test_many_blocks(poison, monkeypatch, window: int | None, n_sink: int) -> None:
    """Blocks of 16 on every axis: some of keys that nobody sees, between sinks and window too."""
    small = lambda kernel, *_: launch.Tile(dict.fromkeys(kernel.tiles[0].meta, 16))  # noqa: E731
    monkeypatch.setattr(launch.tuner, "pick", small)
    T, S = 18, 80
    own = torch.arange(S - T, S, device=DEVICE, dtype=torch.int32)[None]
    first = torch.zeros_like(own)
    first[:, 9:] = S - T + 9
    first[:, :9] = 3
    compare(make(1, 2, T, S, 20, 36, "sqk", "sk", rank=1), Span(first, own, window, n_sink))


@needs_triton
def test_strided_operands(poison) -> None:
    operands = make(2, 3, 9, 9, 16, 16, "sqk", "sqk")
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x.mT for x in operands]
    operands[3], operands[6] = operands[3].mT, operands[6].mT
    span = span_of(2, 9, 9, "documents")
    assert torch.equal(*(call([x.float() for x in z], span, "triton") for z in (operands, turned)))


@needs_triton
@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e4])
def test_extreme_scores(poison, scale: float) -> None:
    operands = make(1, 3, 9, 20, 16, 16, "sqk", "sqk")
    operands[0] *= scale
    compare(operands, span_of(1, 9, 20, "causal"))


@needs_triton
def test_hidden_keys_may_hold_nan(poison) -> None:
    """A key that nobody sees."""
    operands, span = make(1, 3, 5, 9, 16, 16, "sqk", "sqk"), span_of(1, 5, 9, "causal")
    span = Span(span.first, span.own - 1)
    exact = call(operands, span, "reference")
    for i in (1, 5, 8):
        operands[i] = operands[i].clone()
        operands[i][:, :, -1] = torch.nan
    results = [
        call([x.to(dtype) for x in operands], span, impl)
        for impl, dtype in (("reference", torch.float64), ("triton", torch.float32))
    ]
    for o in results:
        torch.testing.assert_close(o.double(), exact, rtol=0, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(poison, dtype: torch.dtype) -> None:
    compare(make(1, 4, 18, 18, 16, 16, "sqk", "sqk"), span_of(1, 18, 18, "documents"), dtype)


@needs_triton
def test_opcheck() -> None:
    from attnzoo_kernels.compose.ops import compose_backward, compose_forward

    q, k, v = (draw(1, 2, 4, 8, seed=i).float().requires_grad_() for i in range(3))
    span = span_of(1, 4, 4, "causal")
    mixes = [x.float().requires_grad_() for x in (draw(1, 4, 2, 2), draw(1, 3, 2, 4), draw(1, 1, 2, 2))]
    where, scale = (span.first, span.own, 0, 0), 0.3
    torch.library.opcheck(compose_forward, (q, k, v, *where, *mixes, None, scale))
    q, k, v, *mixes = (x.detach() for x in (q, k, v, *mixes))
    o, stat = compose_forward(q, k, v, *where, *mixes, None, scale)
    torch.library.opcheck(compose_backward, (o, q, k, v, stat, *where, *mixes, None, scale))


@needs_triton
def test_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    operands, span = make(1, 2, 4, 8, 16, 32, "sqk", ""), span_of(1, 4, 8, "causal")
    with FlopCounterMode(display=False) as counter:
        call([None if x is None else x.float() for x in operands], span, "triton")
    counted = counter.get_flop_counts()["Global"][torch.ops.attnzoo.compose_forward]
    assert counted == 4 * 8 * (2 * 2 * (16 + 32) + 2 * 2 * 2 + 4 * 2 * 2)


@needs_triton
@pytest.mark.parametrize(("H", "rank", "message"), [(17, 1, "up to 16 heads"), (2, 5, "up to rank 4")])
def test_what_the_kernels_refuse(H: int, rank: int, message: str) -> None:
    operands = [None if x is None else x.float() for x in make(1, H, 2, 2, 4, 4, "k", "", rank=rank)]
    with pytest.raises(ValueError, match=message):
        call(operands, span_of(1, 2, 2, "causal"), "triton")
    assert torch.isfinite(call(operands, span_of(1, 2, 2, "causal"), "auto")).all()


def bad(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": bad(2, 3)}, "q: needs 4 axes"),
        ({"k": bad(1, 2, 5, 4)}, "k: needs shape"),
        ({"v": bad(1, 1, 5, 8)}, "v: needs shape"),
        ({"v": bad(1, 2, 5, 8).double()}, "v: needs q's dtype"),
        ({"pre": bad(2, 2)}, "pre: needs a Mix or None, got Tensor"),
        ({"post": Mix(static=bad(2, 3))}, "post.static: needs shape"),
        ({"post": Mix(static=bad(2, 2).long())}, "post.static: needs a floating"),
        ({"pre": Mix(query=bad(1, 4, 3, 2))}, "pre.query: needs shape .* stack w1, w2 and g"),
        ({"pre": Mix(query=bad(1, 3, 5, 2))}, "pre.query: needs shape"),
        ({"pre": Mix(key=bad(1, 3, 3, 2))}, "pre.key: needs shape"),
        ({"span": Span.causal(4, 5, torch.device("cpu"))}, "span.first: needs int32"),
        ({"impl": "cuda"}, "impl: needs one of"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    span = Span.causal(3, 5, torch.device("cpu"))
    plain = {"q": bad(1, 2, 3, 8), "k": bad(1, 2, 5, 8), "v": bad(1, 2, 5, 8), "span": span}
    with pytest.raises(ValueError, match=message):
        compose(**(plain | {"pre": None, "post": None, "scale": 1.0} | change))
