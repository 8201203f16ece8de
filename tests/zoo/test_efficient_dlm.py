"""Block diffusion: the mask, the loss and the bound, training, and sampling by blocks."""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo import Context
from attnzoo.attention.beyond.efficient_dlm import BlockCausal, Copies
from attnzoo.attention.timeline import Axis
from attnzoo.model import create_model, generate
from attnzoo.objective import COPIES, BlockDiffusion
from attnzoo.ops.attention import Keys, attention
from attnzoo.train.diffusion import Diffusion, choose_masked, count_free, draw_t, find_blocks, masked_loss
from attnzoo.train.objective import NextToken, objective_of
from attnzoo.train.prepare import prepare
from golden import load_spec_weights, spec_options
from oracles import rotate
from runs import compose, metrics, train
from test_refusals import named
from tiny import H, build, d, projections, same, tokens, with_weights_of

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = torch.load(GOLDEN / "efficient_dlm.pt", weights_only=True)

REFUSED = [
    ("efficient_dlm", {"block_size": 0}, "block_size", 0),
    ("efficient_dlm", {"half_life": 0.0}, "half_life", 0.0),
    ("efficient_dlm", {"mask_token_id": -1}, "mask_token_id", -1),
    ("efficient_dlm", {"mask_count": "floor"}, "mask_count", "floor"),
    ("efficient_dlm", {"window": 0}, "window", 0),
    ("efficient_dlm", {"n_sink": 1}, "n_sink", 1),
    ("efficient_dlm", {"impl": "triton"}, "impl", "triton"),
    ("gated_deltanet", {"add": "efficient_dlm"}, "add", "efficient_dlm"),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=named(REFUSED))
def test_refused(name: str, options: dict, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: ") as caught:
        attnzoo.create(name, 16, H, **options)
    assert str(value) in str(caught.value)


def doubled(T: int, batch: int = 1) -> tuple[Axis, Context]:
    """The axis of [x_t ; x_0], and what tells a mixer of it."""
    ids = torch.tensor([1] * T + [2] * T).expand(batch, -1)
    order = torch.arange(T).repeat(2)[None].expand(batch, -1)
    return Axis(order, ids), Context(segment_ids=ids, shared={COPIES: True})


def test_golden_masks() -> None:
    file = torch.load(GOLDEN / "efficient_dlm.op.pt", weights_only=True)
    outputs = file["outputs"]
    for name, T, B in (("T24_B4", 24, 4), ("T21_B7", 21, 7), ("T12_B1", 12, 1), ("T16_B16", 16, 16)):
        axis = doubled(T)[0]
        assert torch.equal(Copies(B).visible(axis, axis)[0], outputs[f"mask_{name}"].bool())
    q, k, v = (file["inputs"][n].transpose(1, 2) for n in "qkv")
    axis = doubled(24)[0]
    for impl in ("reference", "sdpa", "flex"):
        o = attention(q, Keys(k, v, axis), mask=Copies(4), query=axis, impl=impl).transpose(1, 2)
        torch.testing.assert_close(o, outputs["o_T24_B4"], rtol=1e-9, atol=1e-9)
    assert torch.equal(outputs["o_T24_B4"], file["y"])


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_golden_output(impl: str) -> None:
    options = spec_options("efficient_dlm", FILE["spec_options"])
    mixer = attnzoo.create("efficient_dlm", 32, impl=impl, **options).double()
    load_spec_weights(mixer, FILE["weights"])
    torch.testing.assert_close(mixer(FILE["x"], doubled(24, 2)[1]), FILE["y"], rtol=1e-9, atol=1e-9)
    clean = FILE["x"][:, 24:]
    torch.testing.assert_close(mixer(clean), FILE["y"][:, 24:], rtol=1e-9, atol=1e-9)


def test_golden_rest() -> None:
    extra, axis = FILE["extra"], doubled(24)[0]
    assert torch.equal(Copies(4).visible(axis, axis)[0], extra["mask"].bool())
    assert torch.equal(BlockCausal(4).dense(24), extra["simple_mask"].bool())
    masked = extra["masked"]
    loss = masked_loss(extra["logits"], extra["labels"], masked, 1 / extra["t_per_token"]) / masked.sum()
    torch.testing.assert_close(loss, extra["loss"], rtol=1e-12, atol=0)
    assert math.log(2) / (0.25 * 4) == pytest.approx(extra["beta_half_life_quarter"], rel=1e-12)


@pytest.mark.parametrize("window, sinks", [(None, 0), (3, 0), (3, 2)])
def test_masks_by_hand(window: int | None, sinks: int) -> None:
    T, B = 13, 4
    axis, seen = doubled(T)[0], torch.zeros(2 * T, 2 * T, dtype=torch.bool)
    for i in range(2 * T):
        for j in range(2 * T):
            a, b = i % T, j % T
            near = window is None or a - b < window or b < sinks
            if (i < T) == (j < T):
                seen[i, j] = a // B == b // B
            if j >= T:
                seen[i, j] |= b // B < a // B and near
    assert torch.equal(Copies(B, window, sinks).visible(axis, axis)[0], seen)
    assert torch.equal(BlockCausal(B, window, sinks).dense(T), seen[T:, T:])


@pytest.mark.parametrize("length", [9, 300])
def test_a_windowed_mixer_is_its_mask(length: int) -> None:
    x = tokens(1, length, 16)
    fused, plain = (build("efficient_dlm", block_size=4, window=6, impl=i) for i in ("auto", "reference"))
    with_weights_of(fused, plain)
    same(fused(x), plain(x))


def test_reductions() -> None:
    x, mha = tokens(), build("mha")
    same(with_weights_of(mha, build("efficient_dlm", block_size=1))(x), mha(x))
    q, k, v = (torch.einsum("btD,hdD->bhtd", x, w) for w in projections(mha, H, H, H))
    q, k = (torch.stack([torch.stack([rotate(h, 10000.0) for h in z]) for z in both]) for both in (q, k))
    o = (q @ k.mT / d**0.5).softmax(-1) @ v
    whole = o.transpose(1, 2).flatten(2) @ mha.out.out_proj.weight.T
    same(with_weights_of(mha, build("efficient_dlm", block_size=9))(x), whole)
    # a noised token sees itself and what came before its block, a clean one all up to itself
    single = with_weights_of(mha, build("efficient_dlm", block_size=1))
    both = single(torch.cat([x.flip(0), x], dim=1), doubled(9, 2)[1])
    same(both[:, 9:], mha(x))
    for i in range(9):
        same(both[:, i], mha(torch.cat([x[:, :i], x.flip(0)[:, i : i + 1]], dim=1))[:, -1])


def test_clean_tokens_do_not_see_noised_ones_nor_noised_their_own_clean_copy() -> None:
    mixer, x = build("efficient_dlm", block_size=4), tokens(1, 24, 16)
    ctx, moved = doubled(12)[1], []
    for place in (5, 12 + 5):  # of block 1: noised, clean
        changed = x.clone()
        changed[:, place] += 1
        moved.append(((mixer(changed, ctx) - mixer(x, ctx)).abs().amax((0, 2)) > 1e-12).tolist())
    block = [False] * 4 + [True] * 4 + [False] * 4
    assert moved[0] == block + [False] * 12
    assert moved[1] == [False] * 8 + [True] * 4 + [False] * 4 + [True] * 8


def test_copies_of_packed_documents_and_padding() -> None:
    """A packed, padded row equals its documents, each doubled alone."""
    mixer, x = build("efficient_dlm", block_size=3), tokens(2, 10, 16)
    ids = torch.tensor([[1] * 4 + [2] * 5 + [0], [3] * 7 + [0] * 3])
    clean = torch.where(ids > 0, ids + 3, 0)
    noised = tokens(2, 10, 16)
    both = torch.cat([noised, x], 1)
    packed = Context(segment_ids=torch.cat([ids, clean], 1), shared={COPIES: True})
    y = mixer(both.masked_fill((packed.segment_ids == 0)[..., None], float("nan")), packed)
    for b, ident in ((0, 1), (0, 2), (1, 3)):
        where = (ids[b] == ident).nonzero()[:, 0]
        alone = mixer(torch.cat([noised[b, where], x[b, where]])[None], doubled(len(where))[1])
        same(y[b, torch.cat([where, where + 10])], alone[0])


def test_copies_need_ids_and_no_cache() -> None:
    mixer, x = build("efficient_dlm", block_size=4), tokens(1, 8, 16)
    with pytest.raises(ValueError, match=r"^segment_ids: "):
        mixer(x, Context(shared={COPIES: True}))
    with pytest.raises(ValueError, match=r"^segment_ids: .*cache"):
        mixer(x, doubled(4)[1], mixer.new_cache(1, 8))


@pytest.mark.parametrize("ragged", [False, True])
def test_a_cache_takes_whole_blocks(ragged: bool) -> None:
    mixer, x = build("efficient_dlm", block_size=4), tokens(2, 12, 16)
    ids = torch.ones(2, 12, dtype=torch.long)
    if ragged:
        ids[1, 8:] = 0
    cache, outs = mixer.new_cache(2, 12), []
    for first, size in ((0, 8), (8, 4)):
        here = slice(first, first + size)
        ctx = Context(segment_ids=ids[:, here]) if ragged else None
        outs.append(mixer(x[:, here], ctx, cache))
    same(torch.cat(outs, 1), mixer(x, Context(segment_ids=ids)))
    ids = torch.tensor([[1] * 4, [1] * 3 + [0]]) if ragged else None
    with pytest.raises(ValueError, match=r"^cache: takes whole blocks of 4"):
        mixer(x[:, : 4 if ragged else 3], Context(segment_ids=ids), mixer.new_cache(2, 12))


def small(layout: object = "efficient_dlm", depth: int = 2, **options) -> nn.Module:
    torch.manual_seed(0)
    options = {"block_size": 4} | options if layout == "efficient_dlm" else options
    model = create_model(layout, vocab_size=11, dim=16, depth=depth, num_heads=4, **options).double()
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.4)
    return model.eval()


def test_layouts_have_one_objective() -> None:
    for layout, names in (
        (["efficient_dlm", "mha"], ("layer 1 (mha)", "next token")),
        (["gated_deltanet", "efficient_dlm"], ("layer 1 (efficient_dlm)", "layer 0 (gated_deltanet)")),
        (["efficient_dlm", {"name": "efficient_dlm", "block_size": 4}], ("block_size=16", "block_size=4")),
    ):
        with pytest.raises(ValueError, match=r"^layout: ") as caught:
            small(layout)
        assert all(name in str(caught.value) for name in names) and "\n" not in str(caught.value)
    for options, field in (({"mask_token_id": 11}, "mask_token_id"), ({"prefix_tokens": 2}, "prefix_tokens")):
        with pytest.raises(ValueError, match=rf"^{field}: "):
            small(**options)
    assert small(["efficient_dlm", {"name": "mla", "add": "efficient_dlm"}]).objective == BlockDiffusion(16)


def test_next_token_loss_is_refused() -> None:
    model = small()
    model.objective = None
    with pytest.raises(ValueError, match=r"^model.layout: next-token loss .* 'efficient_dlm' in layer 0"):
        objective_of(model)
    assert isinstance(objective_of(small("mha")), NextToken) and isinstance(objective_of(small()), Diffusion)


def test_blocks_are_counted_inside_documents() -> None:
    ids = torch.tensor([[1] * 5 + [2] * 3 + [0] * 2])
    block, place = find_blocks(ids, 4)
    assert block.tolist() == [[0, 0, 0, 0, 1, 2, 2, 2, 3, 3]]
    assert place.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 0, 1]]
    assert count_free(find_blocks(ids, 4), ids > 0).tolist() == [[4, 4, 4, 4, 1, 3, 3, 3, 0, 0]]


@pytest.mark.parametrize("mask_count", ["ceil", "round"])
def test_each_block_masks_its_number(mask_count: str) -> None:
    spec = BlockDiffusion(5, half_life=0.25, mask_count=mask_count)
    ids = torch.ones(64, 17, dtype=torch.long)
    ids[:32, 9:] = 2
    ids[5, 14:] = 0
    blocks, free = find_blocks(ids, 5), ids > 0
    t = draw_t(blocks, spec)
    n = count_free(blocks, free)
    number = (t * n).ceil() if mask_count == "ceil" else (t * n).round()
    masked = choose_masked(blocks, number, free, math.log(2) / 1.25 * (1 - t), torch.rand_like(t))
    for b in range(64):
        for block in range(int(blocks.block[b].max()) + 1):
            mine = blocks.block[b] == block
            assert len(t[b, mine].unique()) == 1
            assert int(masked[b, mine].sum()) == int(number[b, mine][0])
    assert not (masked & ~free).any() and (t > 1e-3).all() and (t < 1).all()
    rows = draw_t(blocks, BlockDiffusion(5, half_life=None))
    assert (rows == rows[:, :1]).all() and len(rows.unique()) > 50


def test_places_are_drawn_by_their_weights() -> None:
    """The first token drawn is place i with probability proportional to exp(slope i)."""
    rows, B, slope = 20000, 4, 0.7
    blocks = find_blocks(torch.ones(rows, 2 * B, dtype=torch.long), B)
    masked = choose_masked(
        blocks,
        torch.ones(rows, 2 * B),
        torch.ones(rows, 2 * B, dtype=torch.bool),
        slope,
        torch.rand(rows, 2 * B, generator=torch.Generator().manual_seed(1)),
    )
    share = masked.view(-1, B).double().mean(0)
    weights = (slope * torch.arange(B)).exp().double()
    torch.testing.assert_close(share, weights / weights.sum(), rtol=0, atol=0.01)


def batch_of(rows: int, T: int, documents: bool = False) -> dict:
    text = torch.randint(11, (rows, T), generator=torch.Generator().manual_seed(4))
    ids = torch.ones(rows, T, dtype=torch.long)
    ids[:, 5:] = 2 if documents else 1
    targets = text.roll(-1, 1)
    if documents:
        targets[:, 4] = -100
    return {"tokens": text, "targets": targets, "segment_ids": ids if documents else None}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("clean", [False, True])
def test_training_loss_by_hand(clean: bool, documents: bool) -> None:
    """Each block alone: its noised tokens after the clean (or noised) tokens of earlier blocks."""
    model, batch = small(clean_context=clean), batch_of(3, 11, documents)
    text, runs = batch["tokens"], [(0, 5), (5, 11)] if documents else [(0, 11)]
    seen = {}

    def spy(module, args, kwargs) -> None:
        seen["noised"] = args[0][:, :11]

    handle = model.register_forward_pre_hook(spy, with_kwargs=True)
    torch.manual_seed(7)
    total, count = Diffusion(model).training(model, batch)
    handle.remove()
    torch.manual_seed(7)
    ids = batch["segment_ids"] if documents else torch.ones_like(text)
    t, noised = draw_t(find_blocks(ids, 4), model.objective), seen["noised"]
    masked = noised == 11
    assert count == masked.sum() and torch.equal(noised[~masked], text[~masked])
    expected = 0.0
    for b in range(3):
        for start, end in runs:
            for first in range(start, end, 4):
                last = min(first + 4, end)
                before = (text if clean else noised)[b, start:first]
                logits = model(torch.cat([before, noised[b, first:last]])[None])[0, first - start :]
                for i in range(first, last):
                    if masked[b, i]:
                        expected -= logits[i - first].log_softmax(-1)[text[b, i]] / t[b, i]
    torch.testing.assert_close(total, expected)


def test_validation_estimates_the_mean_over_orders() -> None:
    """-log p of a block, averaged over all orders of filling it in, given the first token of the row."""
    model = small(block_size=3, depth=1)
    text, exact = torch.tensor([[3, 7, 1, 9, 0, 2]]), 0.0
    for first, free in ((0, (1, 2)), (3, (3, 4, 5))):
        orders = list(permutations(free))
        for order in orders:
            block = text[0, first : first + 3].clone()
            block[[i - first for i in free]] = 11
            for i in order:
                logits = model(torch.cat([text[0, :first], block])[None])[0, i]
                exact -= logits.log_softmax(-1)[text[0, i]].item() / len(orders)
                block[i - first] = text[0, i]
    targets = text.roll(-1, 1)
    batch = {"tokens": text.expand(4000, -1), "targets": targets.expand(4000, -1), "segment_ids": None}
    total, count, _ = Diffusion(model).validation(model, batch, seed=3)
    assert count == 6 * 4000  # all have a target; the first token has no own place among the free
    assert total.item() / count.item() * 5 == pytest.approx(exact, rel=0.02)
    again = Diffusion(model).validation(model, batch, seed=3)[0]
    assert torch.equal(total, again) and total != Diffusion(model).validation(model, batch, seed=4)[0]


def test_train_flops_count_both_copies() -> None:
    model, plain = small(), small("mha")
    once, head = model.cost(8), 2 * 16 * 11
    needed, executed = Diffusion(model).train_flops(model, 8)
    assert needed == 3 * (2 * once.forward_flops - head) and executed > needed
    assert Diffusion(small(clean_context=False)).train_flops(model, 8)[0] == 3 * once.forward_flops
    assert NextToken(plain).train_flops(plain, 8)[0] == plain.cost(8).train_flops


@pytest.mark.parametrize("own", [True, False])
def test_the_mask_has_an_embedding(own: bool) -> None:
    model = small(mask_token_id=None if own else 5, tie_head=True)
    hidden = torch.tensor([[1, 11 if own else 5, 3]])
    vector = model.mask_embed if own else model.embed.weight[5]
    same(model._embedded(hidden)[0, 1], vector)
    assert model(hidden).shape == (1, 3, 11) and ("mask_embed" in model.state_dict()) == own


def sampled(model: nn.Module, prompt: list[int], new: int, steps: int | None = None) -> list[int]:
    """Greedy, without a cache: the whole text anew in each step."""
    B, mask = model.objective.block_size, model.objective.mask_id(11)
    text = list(prompt)
    while len(text) < len(prompt) + new:
        first = len(text) // B * B
        text += [mask] * (first + B - len(text))
        rounds = B if steps is None else steps
        for step in range(rounds):
            waits = [i for i in range(first, first + B) if text[i] == mask]
            if not waits:
                break
            logits = model(torch.tensor([text]))[0]
            if mask < 11:
                logits[:, mask] = -math.inf
            p = logits.softmax(-1)
            keep = 1 if steps is None else math.ceil(len(waits) / (rounds - step))
            for i in sorted(waits, key=lambda i: -p[i].max())[:keep]:
                text[i] = int(p[i].argmax())
    return text[len(prompt) : len(prompt) + new]


PROMPTS = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 1, 2], [3] * 11]


@pytest.mark.parametrize("mask_token_id", [None, 10])
@pytest.mark.parametrize("steps", [None, 2])
def test_sampling_is_that_without_a_cache(steps: int | None, mask_token_id: int | None) -> None:
    model = small(mask_token_id=mask_token_id)
    found = generate(model, PROMPTS, 7, temperature=0.0, steps=steps)
    assert found == [sampled(model, p, 7, steps) for p in PROMPTS]
    assert len({tuple(row) for row in found}) > 1, "the model should not be constant"
    assert generate(model, [[1, 2, 3], [4, 5, 6]], 9, temperature=0.0, steps=steps) == [
        sampled(model, p, 9, steps) for p in ([1, 2, 3], [4, 5, 6])
    ]


@pytest.mark.parametrize(
    "layout, options",
    [
        ("efficient_dlm", {"window": 5}),
        ([{"name": "mla", "add": "efficient_dlm", "block_size": 4}] * 2, {}),
        ([{"name": "gqa", "add": ("efficient_dlm", "kha"), "block_size": 4}] * 2, {}),
    ],
    ids=["window", "mla", "kha"],
)
def test_sampling_of_compositions(layout: object, options: dict) -> None:
    model = small(layout, **options)
    assert generate(model, PROMPTS, 6, temperature=0.0) == [sampled(model, p, 6) for p in PROMPTS]


def test_rows_sample_alone() -> None:
    model = small()
    together = generate(model, PROMPTS, 6, seed=5, top_k=6, top_p=0.9)
    assert together == [
        generate(model, [p], 6, seed=5 + i, top_k=6, top_p=0.9)[0] for i, p in enumerate(PROMPTS)
    ]
    assert all(0 <= token < 11 for row in together for token in row)
    stop = together[0][2:4]
    short = generate(model, PROMPTS, 6, seed=5, top_k=6, top_p=0.9, stop=[stop])[0]
    assert short == together[0][: len(short)] and len(short) <= 2
    with pytest.raises(ValueError, match=r"^steps: .*got 0"):
        generate(model, PROMPTS, 6, steps=0)
    with pytest.raises(ValueError, match=r"^steps: .*token by token.*got 2"):
        generate(small("mha"), PROMPTS, 6, steps=2)


@pytest.mark.parametrize("options", [(), ("data.isolate=true", "attention.clean_context=false")], ids=str)
def test_a_run(tmp_path: Path, options: tuple[str, ...]) -> None:
    more = ("attention=efficient_dlm", "attention.block_size=8", "trainer.max_steps=60", "optim.lr=0.01")
    run, summary = train(tmp_path, *more, "trainer.val_every=20", "trainer.sample_tokens=5", *options)
    assert summary["objective"] == "block_diffusion" and "bound" in summary["val_measures"]
    lines = [m["val_bpb"] for m in metrics(run.folder) if m.get("val_bpb")]
    assert lines[-1] < lines[0] - 0.1 and summary["val_bpb"] == lines[-1]
    model, tokenizer = attnzoo.load(run.folder)
    assert model.objective == run.model.objective
    assert len(generate(model, [tokenizer.encode("def ")], 9)[0]) == 9


def test_training_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^layout: .*efficient_dlm"):
        prepare(compose(tmp_path, "attention=efficient_dlm", "model.layout='efficient_dlm,mha'"))
    with pytest.raises(ValueError, match=r"^cross_batch: .*got 4"):
        prepare(compose(tmp_path, "attention=focused_transformer", "attention.cross_batch=4"))


def test_the_loss_of_a_step_is_its_batch_in_parts() -> None:
    """Sums over masked tokens add up over parts of a batch."""
    logits, labels = torch.randn(4, 6, 11), torch.randint(11, (4, 6))
    masked, weight = torch.rand(4, 6) < 0.5, torch.rand(4, 6)
    whole = masked_loss(logits, labels, masked, weight)
    parts = [masked_loss(logits[i], labels[i], masked[i], weight[i]) for i in range(4)]
    torch.testing.assert_close(whole, sum(parts, torch.zeros(())))
    empty: Tensor = masked_loss(logits, labels, torch.zeros_like(masked), weight)
    assert empty == 0
