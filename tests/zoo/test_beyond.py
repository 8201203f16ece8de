"""Variants that read beyond their own past: other rows of the batch, codebooks, a memory of chunks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.attention import timeline
from attnzoo.attention.beyond.discrete_kv_bottleneck import Bottleneck
from attnzoo.attention.beyond.focused_transformer import CrossBatch
from attnzoo.attention.beyond.recurrent_memory_chunked import MemoryReads
from attnzoo.attention.call import Call, Raw
from attnzoo.attention.site import Site
from attnzoo.attention.stages.mask import Causal
from attnzoo.context import Collector, Context
from attnzoo.data.sampler import Sampler
from attnzoo.ops.attention import Keys, attention
from attnzoo.testing import PROPERTIES, Subject
from oracles import rotate
from runs import train
from test_refusals import named
from tiny import H, build, d, projections, same, tokens, with_weights_of

GOLDEN = Path(__file__).parents[1] / "golden"

REFUSED = [
    ("focused_transformer", {"cross_batch": -1}, "cross_batch", -1),
    ("focused_transformer", {"pack": 0}, "pack", 0),
    ("focused_transformer", {"memory_layers": (1,)}, "memory_layers", 1),
    ("focused_transformer", {"memory_layers": ()}, "memory_layers", "[]"),
    ("focused_transformer", {"memory_positions": "last"}, "memory_positions", "last"),
    ("mla", {"add": "focused_transformer", "cross_batch": 1}, "cross_batch", 1),
    ("focused_transformer", {"last_context_length": 0}, "last_context_length", 0),
    ("focused_transformer", {"last_context_length": 4, "memory_topk": 0}, "memory_topk", 0),
    ("focused_transformer", {"memory_topk": 4}, "memory_topk", 4),
    ("dcmha", {"add": "focused_transformer", "last_context_length": 5}, "last_context_length", 5),
    ("efficient_dlm", {"add": "focused_transformer", "last_context_length": 5}, "last_context_length", 5),
    ("dcmha", {"add": "focused_transformer", "cross_batch": 1}, "cross_batch", 1),
    ("discrete_kv_bottleneck", {"num_codebooks": 0}, "num_codebooks", 0),
    ("discrete_kv_bottleneck", {"num_keys": 1}, "num_keys", 1),
    ("discrete_kv_bottleneck", {"dim_key": 17}, "dim_key", 17),
    ("discrete_kv_bottleneck", {"dim_key": 0}, "dim_key", 0),
    ("discrete_kv_bottleneck", {"warmup_steps": -1}, "warmup_steps", -1),
    ("discrete_kv_bottleneck", {"ema_decay": 1.0}, "ema_decay", 1.0),
    ("discrete_kv_bottleneck", {"init_std": 0.0}, "init_std", 0.0),
    ("discrete_kv_bottleneck", {"aggregate": "concat", "num_codebooks": 3}, "num_codebooks", 3),
    ("discrete_kv_bottleneck", {"straight_through": True}, "straight_through", "true"),
    ("recurrent_memory_chunked", {"chunk": 0}, "chunk", 0),
    ("recurrent_memory_chunked", {"mem_slots": -1}, "mem_slots", -1),
    ("recurrent_memory_chunked", {"window": 4, "use_global": False}, "window", 4),
    ("dcmha", {"add": "recurrent_memory_chunked"}, "mem_slots", 32),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=named(REFUSED))
def test_refused(name: str, options: dict, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: ") as caught:
        attnzoo.create(name, 16, H, **options)
    assert str(value) in str(caught.value)


def cross(rows: int = 2, **options) -> torch.nn.Module:
    return build("focused_transformer", cross_batch=rows, **options).train()


def test_cross_batch_golden() -> None:
    file = torch.load(GOLDEN / "focused_transformer.op.pt", weights_only=True)
    options, (B, T, heads, width) = file["spec_options"], file["y"].shape
    read = CrossBatch(options["cross_batch"], options["pack"], True, Causal(), (heads, width, width))
    source, seen = read.sources(B, torch.device("cpu"))
    assert seen.sum(1).tolist() == file["extra"]["range_per_row"]
    assert all(source[b, r] == b - r - 1 for b in range(B) for r in range(3) if seen[b, r])
    q, k, v = (file["inputs"][n].transpose(1, 2) for n in "qkv")
    turned = [torch.stack([torch.stack([rotate(h, 10000.0) for h in z]) for z in both]) for both in (q, k)]

    def attend(q: Tensor, *sets, **more):
        return attention(q, *sets, query=call.query, scale=width**-0.5)

    x = torch.zeros(B, T, 1)
    call = Call(Site(), x, Context(), timeline.read(Context(), B, T, x.device), None)
    call.raw = Raw(q, k, v)
    o = read.train()(turned[0], Keys(turned[1], v, call.mem.axis()), attend, call)
    torch.testing.assert_close(o.transpose(1, 2), file["y"], rtol=1e-9, atol=1e-9)


def fot_oracle(mixer, x: Tensor, ranges: list[int], theta: float | None, kv: int) -> Tensor:
    """Row by row, query by query."""
    W = projections(mixer, H, kv, kv)
    q, k, v = (torch.einsum("btD,hdD->bhtd", x, w) for w in W)
    y = torch.zeros_like(x)
    for b, reach in enumerate(ranges):
        heads = []
        for h in range(H):
            g = h * kv // H
            qh, kh = rotate(q[b, h], theta), rotate(k[b, g], theta)
            out = []
            for i in range(x.shape[1]):
                keys = [kh[: i + 1], *(k[b - r, g] for r in range(1, reach + 1))]
                vals = [v[b, g, : i + 1], *(v[b - r, g] for r in range(1, reach + 1))]
                p = (torch.cat(keys) @ qh[i] / d**0.5).softmax(0)
                out.append(p @ torch.cat(vals))
            heads.append(torch.stack(out))
        y[b] = torch.cat(heads, dim=1) @ mixer.out.out_proj.weight.T
    return y


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(
    "options, ranges",
    [
        ({}, [0, 1, 2, 2]),
        ({"stepping": True, "pack": 2}, [0, 1, 0, 2]),
        ({"memory_positions": "none"}, [0, 1, 2, 2]),
        ({"num_kv_heads": 2}, [0, 1, 2, 2]),
    ],
    ids=str,
)
def test_cross_batch_oracle(options: dict, ranges: list[int], impl: str) -> None:
    mixer, x = cross(impl=impl, **options), tokens(4, 7, 16)
    theta = None if options.get("memory_positions") == "none" else 10000.0
    same(mixer(x), fot_oracle(mixer, x, ranges, theta, options.get("num_kv_heads", H)))


def test_cross_batch_reduces_to_mha() -> None:
    x, focused = tokens(4, 7, 16), cross()
    plain = with_weights_of(focused, build("mha"))
    same(focused(x)[0], plain(x)[0])
    assert (focused(x)[1:] - plain(x)[1:]).abs().amax((1, 2)).min() > 1e-3
    same(focused.eval()(x), plain(x))
    same(with_weights_of(plain, build("focused_transformer"))(x), plain(x))
    lone = build("focused_transformer", cross_batch=2, layer_idx=1, num_layers=4, memory_layers=(3,))
    same(with_weights_of(plain, lone)(x), plain(x))


def reading_oracle(mixer, x: Tensor, W: int, most: int | None, theta: float | None, kv: int) -> Tensor:
    """Query by query: near keys at their places, far ones W - 1 tokens away, the best ``most`` of them."""
    q, k, v = (torch.einsum("btD,hdD->bhtd", x, w) for w in projections(mixer, H, kv, kv))
    y = torch.zeros_like(x)
    for b in range(len(x)):
        for i in range(x.shape[1]):
            heads = []
            for h in range(H):
                g = h * kv // H
                s = []
                for j in range(i + 1):
                    away = min(i - j, W - 1)
                    turned = rotate(torch.stack([k[b, g, j], *[q[b, h, i]] * max(away, 1)]), theta)
                    s.append((turned[0] @ turned[away] if away else k[b, g, j] @ q[b, h, i]) / d**0.5)
                far = sorted(s[: max(0, i - W + 1)], reverse=True)
                least = far[most - 1] if most is not None and len(far) > most else -math.inf
                s = [z if i - j < W or z >= least else torch.tensor(-math.inf) for j, z in enumerate(s)]
                heads.append(torch.stack(s).softmax(0) @ v[b, g, : i + 1])
            y[b, i] = torch.cat(heads) @ mixer.out.out_proj.weight.T
    return y


READING = [
    {"last_context_length": 4},
    {"last_context_length": 1, "num_kv_heads": 2},
    {"last_context_length": 3, "memory_topk": 2},
    {"last_context_length": 3, "memory_topk": 1, "memory_positions": "none"},
    {"last_context_length": 2, "memory_topk": 50, "cross_batch": 2},
]


@pytest.mark.parametrize("options", READING, ids=str)
def test_far_keys_are_read_from_the_start_of_the_local_context(options: dict) -> None:
    mixer, x = build("focused_transformer", **options).eval(), tokens(2, 11, 16)
    theta = None if options.get("memory_positions") == "none" else 10000.0
    size, most = options["last_context_length"], options.get("memory_topk")
    want = reading_oracle(mixer, x, size, most, theta, options.get("num_kv_heads", H))
    same(mixer(x), want)
    same(mixer(x, Context(positions=torch.arange(11)[None] + 1000)), want)
    if not options.get("cross_batch"):
        host = build("gqa", pos="rope" if theta else "none", num_kv_heads=options.get("num_kv_heads", H))
        same(mixer.train()(x), with_weights_of(mixer, host)(x))


def test_memory_reduces_to_mha() -> None:
    """Within the local context; and, without positions, whatever it is."""
    x, plain = tokens(2, 9, 16), build("mha")
    same(with_weights_of(plain, build("focused_transformer", last_context_length=9).eval())(x), plain(x))
    short = with_weights_of(plain, build("focused_transformer", last_context_length=3).eval())
    assert (short(x) - plain(x))[:, 3:].abs().amax((0, 2)).min() > 1e-3
    same(short(x)[:, :3], plain(x)[:, :3])
    free = {"last_context_length": 3, "memory_positions": "none"}
    bare = build("mha", pos="none")
    same(with_weights_of(bare, build("focused_transformer", **free).eval())(x), bare(x))


@pytest.mark.parametrize("prop", PROPERTIES)
def test_memory_keeps_the_contract(prop: str) -> None:
    options = {"last_context_length": 4, "memory_topk": 3, "num_kv_heads": 2}
    PROPERTIES[prop](Subject.of("focused_transformer", **options))


@pytest.mark.parametrize("host, more", [("mla", {}), ("gqa", {"window": 6, "n_sink": 2}), ("kha", {})])
def test_memory_on_other_hosts(host: str, more: dict) -> None:
    options = {"add": "focused_transformer", "last_context_length": 4, **more}
    if host == "mla":  # keys with a rotary slice of their own
        with pytest.raises(ValueError, match=r"^last_context_length: .*rotary.*4"):
            build(host, **options)
        return
    for prop in ("causal", "decode", "documents", "document_decode", "flops"):
        PROPERTIES[prop](Subject.of(host, **options))


def test_order_of_pairs_in_another_row_does_not_matter() -> None:
    mixer, x = cross(1), tokens(2, 7, 16)
    moved = torch.stack([x[0, torch.randperm(7)], x[1]])
    same(mixer(moved)[1], mixer(x)[1])


def test_other_rows_get_gradients_and_later_rows_do_not_leak() -> None:
    mixer, x = cross(1), tokens(4, 7, 16).requires_grad_()
    mixer(x)[2].sum().backward()
    assert [bool(g.abs().sum() > 0) for g in x.grad] == [False, True, True, False]


def test_cross_batch_window_spares_other_rows() -> None:
    mixer, x = cross(1, window=1), tokens(2, 7, 16)
    assert (mixer(x)[1, 6] - build("mha")(x)[1, 6]).abs().max() > 1e-3
    changed = x.clone()
    changed[1, :6] += 1
    same(mixer(changed)[1, 6], mixer(x)[1, 6])
    changed[0] += 1
    assert (mixer(changed)[1, 6] - mixer(x)[1, 6]).abs().max() > 1e-3


def test_cross_batch_refuses_in_the_forward() -> None:
    mixer, x = cross(), tokens(4, 7, 16)
    for ctx, cache, bad, field in (
        (Context(segment_ids=torch.ones(4, 7, dtype=torch.long)), None, x, "segment_ids"),
        (None, mixer.new_cache(4, 7), x, "cache"),
        (None, None, x[:2], "cross_batch"),
        (None, None, x[:3], "pack"),
    ):
        with pytest.raises(ValueError, match=rf"^{field}: "):
            mixer(bad, ctx, cache)


def test_cross_batch_cost_counts_the_other_rows() -> None:
    one, three = (build("focused_transformer", cross_batch=r).cost(8) for r in (1, 3))
    plain = build("mha").cost(8)
    assert not one.exact and one.params == plain.params
    assert three.forward_flops - one.forward_flops == 2 * 4 * H * d * 8
    assert one.forward_flops - plain.forward_flops == 4 * H * d * 8


def test_packs_of_samples_read_on() -> None:
    sampler = Sampler("fingerprint", 5, 1003, 10, pack=3)
    assert sampler.samples_per_epoch == 99
    for epoch in range(2):
        starts = [sampler.start(epoch * 99 + i) for i in range(99)]
        assert all((starts[i + 1] - starts[i]) % 1003 == 10 for i in range(98) if i % 3 < 2)
        assert sum((starts[i + 1] - starts[i]) % 1003 == 10 for i in range(2, 98, 3)) < 10
        assert len({(start + i) % 1003 for start in starts for i in range(10)}) == 990
    plain = Sampler("fingerprint", 5, 1003, 10)
    assert [Sampler("fingerprint", 5, 1003, 10, pack=1).start(n) for n in range(200)] == [
        plain.start(n) for n in range(200)
    ]


def test_a_run_on_packs(tmp_path: Path) -> None:
    options = ("attention=focused_transformer", "attention.cross_batch=1", "data.pack=2")
    run, summary = train(tmp_path, *options)
    assert summary["status"] == "completed"
    rows = [run.corpus.sample(n)["tokens"] for n in range(4)]
    assert torch.equal(rows[0][-1:], rows[1][:1]) and torch.equal(rows[2][-1:], rows[3][:1])
    for more, field in (
        (("data.pack=3",), "data.pack"),
        (("trainer.accumulate=4",), "cross_batch"),
        (("data.isolate=true", "trainer.max_steps=1"), "segment_ids"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=rf"{field}: "):
            train(tmp_path, *options, *more, name=f"refused-{field}")


def bottleneck(**options) -> torch.nn.Module:
    mixer = build("discrete_kv_bottleneck", num_codebooks=4, num_keys=6, dim_key=3, **options)
    stage = mixer.after[0]
    stage.values.normal_()
    stage.gain.fill_(0.7)
    return mixer


def test_bottleneck_golden() -> None:
    file = torch.load(GOLDEN / "discrete_kv_bottleneck.op.pt", weights_only=True)
    weights, extra, x = file["weights"], file["extra"], file["x"]
    C, K, width = weights["values"].shape
    for aggregate, y in (("mean", file["y"]), ("concat", extra["values_per_codebook"].flatten(2))):
        stage = Bottleneck(x.shape[-1], (C, K, weights["R"].shape[2]), width, aggregate).double()
        stage.load_state_dict(stage.state_dict() | weights)
        out, index, _ = stage.read(x)
        torch.testing.assert_close(out, y, rtol=1e-9, atol=1e-9)
        assert torch.equal(index.T.unflatten(0, x.shape[:2]), extra["indices"])


@pytest.mark.parametrize("aggregate", ["mean", "concat"])
def test_bottleneck_oracle(aggregate: str) -> None:
    mixer, x = bottleneck(aggregate=aggregate), tokens()
    stage, y = mixer.after[0], with_weights_of(mixer, build("mha"))(x)
    for b in range(2):
        for t in range(x.shape[1]):
            found = []
            for c in range(4):
                u = x[b, t] @ stage.R[c]
                found.append(stage.values[c, ((u - stage.keys[c]) ** 2).sum(1).argmin()])
            y[b, t] += 0.7 * (torch.cat(found) if aggregate == "concat" else torch.stack(found).mean(0))
    same(mixer(x), y)


@pytest.mark.parametrize("host", ["mha", "linear", "mla"])
def test_bottleneck_starts_as_its_host(host: str) -> None:
    x, plain = tokens(), build(host)
    same(with_weights_of(plain, build(host, add="discrete_kv_bottleneck"))(x), plain(x))


def test_one_key_is_a_constant() -> None:
    stage = Bottleneck(16, (2, 1, 3), 16).double()
    out = stage.read(tokens())[0]
    same(out, stage.values.mean((0, 1)).expand_as(out))


def test_a_value_touches_its_tokens_only() -> None:
    mixer, x = bottleneck(), tokens()
    before, index = mixer(x), mixer.after[0].read(x)[1][1]
    mixer.after[0].values[1, index[0]] += 1
    touched = (mixer(x) - before).abs().amax(-1) > 1e-9
    assert torch.equal(touched.flatten(), index == index[0]) and not touched.all()


def test_gradient_to_x_only_when_straight_through() -> None:
    x = tokens()
    for straight in (False, True):
        stage = Bottleneck(16, (2, 5, 3), 16, straight=straight, detach=not straight).double()
        leaf = x.clone().requires_grad_()
        out = stage.read(leaf)[0]
        same(out, Bottleneck.read(stage, x)[0])
        grads = torch.autograd.grad((out * x).sum(), [leaf, stage.values], allow_unused=True)
        assert (grads[0] is not None) == straight and bool((grads[1] != 0).any())
        if straight:
            u = torch.einsum("btD,cDk->cbtk", leaf, stage.R)
            near = -(u[..., None, :] - stage.keys[:, None, None]).square().sum(-1)
            soft = torch.einsum("cbtK,cKv->btv", near.softmax(-1), stage.values) / 2
            same(grads[0], torch.autograd.grad((soft * x).sum(), leaf)[0])


def warm(stage: Bottleneck, x: Tensor, step: int, ids: Tensor | None = None) -> dict:
    collector = Collector()
    ctx = Context(collector=collector, segment_ids=ids)
    call = Call(Site(), x, ctx, timeline.read(ctx, *x.shape[:2], x.device), None)
    stage.train()(torch.zeros_like(x), call)
    stats = {name: layers[0] for name, layers in collector.steps.items()}
    stage.on_step(step, stats, torch.Generator().manual_seed(step))
    return stats


def test_keys_follow_features_then_freeze() -> None:
    stage = Bottleneck(16, (1, 4, 3), 16, warmup=40, decay=0.5).double().requires_grad_(False)
    centres = 4 * torch.randn(4, 16, dtype=torch.float64)
    draw = lambda: centres[torch.randint(4, (2, 30))] + 0.01 * tokens(2, 30, 16)  # noqa: E731
    for step in range(1, 41):
        warm(stage, draw(), step)
    features = centres @ stage.R[0]
    gap = torch.cdist(features, stage.keys[0]).amin(1).max()
    assert gap < 0.2, "every cluster has a key at its mean"
    saved, kept = {k: v.clone() for k, v in stage.state_dict().items()}, stage.keys.clone()
    assert bool(stage.frozen) and not warm(stage, draw(), 41) and torch.equal(stage.keys, kept)
    again = Bottleneck(16, (1, 4, 3), 16, warmup=40, decay=0.5).double()
    again.load_state_dict(saved)
    warm(again, draw(), 1)
    assert torch.equal(again.keys, kept), "keys of a loaded bottleneck stay frozen"


def test_warm_up_sees_tokens_not_padding() -> None:
    x, ids = tokens(), torch.ones(2, 9, dtype=torch.long)
    ids[1, 4:] = 0
    stage = Bottleneck(16, (2, 5, 3), 16, warmup=5).double()
    u, index = stage.read(x)[2], stage.read(x)[1]
    keep = ids.flatten() > 0
    stats = warm(stage, x, 1, ids)
    for c in range(2):
        for i in range(5):
            mine = keep & (index[c] == i)
            assert stats["dkvb/counts"][c, i] == mine.sum()
            same(stats["dkvb/sums"][c, i], u[c, mine].sum(0))


def memory_oracle(mixer, x: Tensor, c: int, S: int, use_global: bool, window: int | None = None) -> Tensor:
    """One row, chunk by chunk and query by query."""
    read, T = mixer.read, len(x)
    kv = mixer.project.heads[1]
    q, k, v = (torch.einsum("tD,hdD->htd", x, w) for w in projections(mixer, H, kv, kv))
    bank, last = [], torch.zeros(x.shape[1], dtype=x.dtype)
    o = torch.zeros(T, H, d, dtype=x.dtype)
    paths = (["global"] if use_global else []) + ["own"] + (["memory"] if S else [])
    mix = read.mix.softmax(0) if len(paths) > 1 else torch.ones(1, H, dtype=x.dtype)
    for t in range(T):
        if S and t and t % c == 0:
            mean = x[t - c : t].mean(0)
            g = (torch.cat([mean, last]) @ read.gate.weight.T + read.gate.bias).sigmoid()
            last = g * (mean @ read.write.weight.T).tanh() + (1 - g) * last
            bank = [*bank, last][-S:]
        for h in range(H):
            j = h * kv // H
            qt, kt = rotate(q[h], 10000.0)[t], rotate(k[j], 10000.0)
            low = 0 if window is None else max(0, t - window + 1)
            outs = []
            for path in paths:
                if path == "memory":
                    keys = [m @ read.mem_kv.weight[j * d : (j + 1) * d].T for m in bank]
                    start = kv * d + j * d
                    vals = [m @ read.mem_kv.weight[start : start + d].T for m in bank]
                    p = torch.stack([q[h, t] @ key / d**0.5 for key in keys]).softmax(0) if bank else []
                    outs.append(sum((w * val for w, val in zip(p, vals, strict=True)), torch.zeros(d)))
                else:
                    first = low if path == "global" else t // c * c
                    p = (kt[first : t + 1] @ qt / d**0.5).softmax(0)
                    outs.append(p @ v[j, first : t + 1])
            o[t, h] = sum(mix[i, h] * out for i, out in enumerate(outs))
    return o.flatten(1) @ mixer.out.out_proj.weight.T


def chunked(**options) -> torch.nn.Module:
    mixer = build("recurrent_memory_chunked", **options)
    read = mixer.read
    if hasattr(read, "gate"):
        read.gate.bias.normal_()
    if read.mix is not None:
        read.mix.normal_()
    return mixer


@pytest.mark.parametrize(
    "options",
    [
        {"chunk": 4, "mem_slots": 2},
        {"chunk": 3, "mem_slots": 9, "num_kv_heads": 2},
        {"chunk": 3, "mem_slots": 0},
        {"chunk": 1, "mem_slots": 3, "use_global": False},
        {"chunk": 5, "mem_slots": 1, "use_global": False},
        {"chunk": 4, "mem_slots": 0, "use_global": False},
        {"chunk": 4, "mem_slots": 2, "window": 2},
    ],
    ids=str,
)
def test_memory_oracle(options: dict) -> None:
    mixer, x = chunked(**options), tokens(2, 23, 16)
    rest = (options["chunk"], options["mem_slots"], options.get("use_global", True), options.get("window"))
    same(mixer(x), torch.stack([memory_oracle(mixer, row, *rest) for row in x]))


MEMORIES = [
    {"chunk": 4, "mem_slots": 2, "use_global": False},
    {"chunk": 3, "mem_slots": 3, "window": 2, "n_sink": 1},
    {"chunk": 5, "mem_slots": 2, "window": 7, "num_kv_heads": 2},
    {"chunk": 4, "mem_slots": 0, "use_global": False},
    {"chunk": 2, "mem_slots": 4, "output_gate": "headwise", "qk_norm": True},
]


@pytest.mark.parametrize("options", MEMORIES, ids=str)
@pytest.mark.parametrize("prop", PROPERTIES)
def test_memory_properties(prop: str, options: dict) -> None:
    PROPERTIES[prop](Subject.of("recurrent_memory_chunked", **options))


COMPOSED = [
    ("mla", {"add": "recurrent_memory_chunked", "chunk": 4, "mem_slots": 2}),
    ("recurrent_memory_chunked", {"add": ("moh", "kha"), "chunk": 4, "mem_slots": 2, "kind": "mlp"}),
    ("gated_deltanet", {"add": "discrete_kv_bottleneck", "num_keys": 5, "aggregate": "concat"}),
    ("mla", {"add": ("focused_transformer", "discrete_kv_bottleneck"), "num_keys": 5, "window": 6}),
]


@pytest.mark.parametrize("name, options", COMPOSED, ids=named(COMPOSED))
@pytest.mark.parametrize("prop", PROPERTIES)
def test_composition(prop: str, name: str, options: dict) -> None:
    PROPERTIES[prop](Subject.of(name, **options))


def test_memory_reductions() -> None:
    x, mixer = tokens(2, 23, 16), chunked(chunk=4, mem_slots=3)
    plain = with_weights_of(mixer, build("mha"))
    mixer.read.mix.fill_(-1e9)[0] = 0
    same(mixer(x), plain(x))
    local = with_weights_of(plain, build("recurrent_memory_chunked", chunk=4, mem_slots=0, use_global=False))
    blocks = torch.cat([plain(part) for part in x.split(4, dim=1)], dim=1)
    same(local(x), blocks)
    # a closed gate keeps the initial memory, 0: its read is 0 and keeps its weight
    mixer.read.mix.zero_()
    mixer.read.gate.weight.zero_()
    mixer.read.gate.bias.fill_(-1e9)
    same(mixer(x), (plain(x) + blocks) / 3)


def test_memory_of_a_chunk_is_not_read_inside_it() -> None:
    """A summary is of a whole chunk: tokens of the chunk, the last too, must not read it."""
    mixer, x = chunked(chunk=4, mem_slots=2, use_global=False), tokens(1, 12, 16)
    mixer.read.mix[0] = -1e9  # the memory alone
    changed = x.clone()
    changed[:, 5] += 1
    differs = (mixer(changed) - mixer(x)).abs().amax((0, 2)) > 1e-12
    assert differs.tolist() == [False] * 8 + [True] * 4


def test_memory_is_linear_in_its_chunks() -> None:
    """The FLOPs of the memory are those of S slots per query, not of T keys."""
    cost = [build("recurrent_memory_chunked", chunk=16, mem_slots=4).cost(T) for T in (512, 4096)]
    plain = [build("mha").cost(T) for T in (512, 4096)]
    extra = [a.forward_flops - b.forward_flops for a, b in zip(cost, plain, strict=True)]
    assert extra[1] < 1.05 * extra[0]


def test_detached_memory_stops_at_the_chunk_before() -> None:
    for detach in (False, True):
        mixer = chunked(chunk=2, mem_slots=1, use_global=False, detach_memory=detach)
        mixer.read.mix[0] = -1e9
        x = tokens(1, 7, 16).requires_grad_()
        mixer(x)[:, 6].sum().backward()  # it reads the summary of chunk 2 alone
        reached = (x.grad[0].abs().sum(1) > 1e-12).tolist()
        assert reached == [not detach] * 4 + [True] * 2 + [False]


def test_reads_are_stages_of_their_own() -> None:
    assert isinstance(chunked(chunk=4).read, MemoryReads)
