"""Ranks that share heads compute what one does: every registered variant, in one process, in fp64."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo import Collector, Context
from attnzoo.parallel.plan import split_heads, splits
from attnzoo.parallel.tensor import (
    Share,
    assemble,
    norm_weight,
    own,
    put_shards,
    shards_of,
    sync_gradients,
)
from attnzoo.testing.subject import LENGTH, Subject, inputs
from threads import on_ranks

MUST = (
    "mha", "gqa", "mqa", "mla", "tpla", "moh", "kha", "sliding_window", "linear", "gated_deltanet", "retnet",
    "gla", "deltanet", "mamba2", "kda", "lightning_attention", "sqa", "gla_latent", "mtla", "elitekv",
    "kv_shift", "hgrn2",
)  # fmt: skip
IDS = ((1,) * 5 + (2,) + (3,) * 8 + (0,) * 3 + (4,) * 4, (7,) * 4 + (9,) * 17)


def close(ours: Tensor, theirs: Tensor, what: str, tolerance: float = 1e-10) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    size = float(theirs.abs().max()) if theirs.numel() else 0.0
    gap = float((ours - theirs).abs().max()) if theirs.numel() else 0.0
    assert gap <= tolerance * max(size, 1e-3), f"{what} differs by {gap:.1e} of {size:.1e}"


class Result:
    """What a forward and backward of one rank gave."""

    def __init__(self, mixer: nn.Module, x: Tensor, ids: Tensor | None, share: Share | None = None) -> None:
        x = x.clone().requires_grad_()
        collector = Collector()
        self.y = mixer(x, Context(segment_ids=ids, collector=collector))
        self.aux = collector.total()
        ((self.y * inputs(seed=3)).sum() + 30 * self.aux).backward()
        if share is not None:
            sync_gradients(mixer, share)
        share = share or Share(0, 1)
        self.x_grad, self.grads, self.square = x.grad, {}, torch.zeros((), dtype=x.dtype)
        for name, p in mixer.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.square += (norm_weight(p, share.ranks) * grad.square()).sum()
            self.grads[name] = assemble(grad, getattr(p, "shards", None), share)
        marks = shards_of(mixer)
        state = mixer.state_dict().items()
        self.state = {name: assemble(value, marks.get(name), share) for name, value in state}
        self.stats = collector.stats | collector.steps


def compare(full: nn.Module, ranks: int, packs: bool = True) -> None:
    """A rank of several against one."""
    x, ids = inputs(), torch.tensor(IDS) if packs else None
    parts = [copy.deepcopy(full) for _ in range(ranks)]

    def run(rank: int, group: Any) -> Result:
        share = Share(rank, ranks, group)
        split_heads(parts[rank], share)
        return Result(parts[rank], x, ids, share)

    alone, found = Result(full, x, ids), on_ranks(ranks, run)
    for result in found:
        close(result.y, alone.y, "y")
        close(result.aux, alone.aux, "the auxiliary loss")
        close(result.x_grad, alone.x_grad, "the gradient of x")
        assert result.grads.keys() == alone.grads.keys()
        for name, grad in alone.grads.items():
            close(result.grads[name], grad, f"the gradient of {name}")
        assert result.stats.keys() == alone.stats.keys()
        for name, layers in alone.stats.items():
            for layer, value in layers.items():
                close(result.stats[name][layer], value, name)
        assert result.state.keys() == alone.state.keys()
        for name, value in alone.state.items():
            assert torch.equal(result.state[name], value), f"{name} is another when put together"
    close(sum(result.square for result in found), alone.square, "the squared norm of the gradients")


@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_ranks_equal_one(name: str) -> None:
    for case, subject in Subject.cases(name).items():
        mixer = subject.mixer()
        try:
            split_heads(copy.deepcopy(mixer), Share(0, 2))
        except ValueError as error:
            assert name not in MUST, f"{case}: {error}"
            assert str(error).startswith("launcher.tensor_parallel: ")
            continue
        compare(mixer, 2, subject.has("packs"))


CASES = [
    ("mha", 4, {"out_bias": True, "qkv_bias": True, "qk_norm": True, "output_gate": "headwise"}),
    ("mha", 2, {"output_gate": "elementwise", "window": 5, "n_sink": 1}),
    ("gqa", 2, {"num_kv_heads": 1, "qkv_bias": True}),
    ("gqa", 4, {"num_kv_heads": 2, "qkv_bias": True, "qk_norm": True}),
    ("kha", 4, {"num_kv_heads": 2, "kind": "linear"}),
    ("kha", 2, {"num_kv_heads": 1, "kind": "gate"}),
    ("kv_shift", 4, {"num_kv_heads": 2}),
    ("mla", 2, {"q_lora_rank": 6, "qkv_bias": True, "out_bias": True}),
    ("mla", 4, {"add": ("moh", "kha"), "kind": "linear", "latent_norm": False, "pos": "none"}),
    ("gla_latent", 4, {"num_latent_heads": 2}),
    ("tpla", 2, {"latent_shards": 4, "shard_norm": "sharded", "shard_gain": (1.5, 1.0, 0.7, 2.0)}),
    ("tpla", 2, {"add": "moh", "output_gate": "elementwise", "qk_norm": True, "out_bias": True}),
    ("tpla", 4, {"latent_shards": 2}),
    ("tpla", 2, {"latent_shards": 1}),
    ("elitekv", 4, {"num_kv_heads": 2}),
    ("moh", 4, {"shared_heads": 2, "num_kv_heads": 2}),
    ("moh", 2, {"shared_heads": 0, "gate_form": "paper"}),
    ("gated_deltanet", 4, {"num_v_heads": 8, "add": "moh"}),
    ("gated_deltanet", 2, {"use_short_conv": False, "allow_neg_eigval": True}),
    ("gla", 4, {"num_kv_heads": 2, "use_short_conv": True}),
    ("mamba2", 4, {"n_groups": 1, "qkv_bias": True}),
    ("mamba2", 2, {"n_groups": 4}),
    ("lightning_attention", 4, {"out_bias": True}),
    ("retnet", 4, {"torchscale_norm": True, "norm_affine": True}),
    ("sqa", 4, {"num_query_heads": 1, "num_kv_heads": 4}),
    ("sqa", 4, {"num_query_heads": 2, "num_kv_heads": 4}),
    ("dha", 2, {"key_map": (0, 0, 1, 1), "value_map": (0, 1, 0, 1)}),
    ("dha", 4, {"key_map": (0, 0, 1, 1), "value_map": (0, 1, 2, 3)}),
    ("pavlovian", 4, {}),
    ("linear", 4, {"num_kv_heads": 2, "normalize": False}),
    ("wgqa", 4, {"num_kv_heads": 2, "weight_kind": "col", "qkv_bias": True}),
    ("flare", 4, {"num_kv_heads": 2}),
    ("cca", 4, {"qkv_bias": True}),
    ("ccgqa", 2, {"num_kv_heads": 1, "qk_mean": False}),
    ("mfa", 4, {"out_factor": "shared", "out_bias": True, "qkv_bias": True}),
    ("mhe", 4, {}),
    ("kvt", 4, {"kv_variant": "kv_pos"}),
    ("rwkv7", 4, {}),
    ("log_linear", 4, {}),
    ("hgrn2", 2, {"num_kv_heads": 1}),
    ("recurrent_memory_chunked", 4, {"num_kv_heads": 2}),
    ("diffqkv", 4, {"aug_dim": 0, "key_dim": 3}),
    ("linear", 2, {"feature_map": "relu"}),
    ("linear", 2, {"feature_map": "identity", "normalize": False, "num_kv_heads": 2}),
    ("linear", 2, {"feature_map": "hedgehog", "num_kv_heads": 1}),
    ("linear", 2, {"feature_map": "t2r", "num_kv_heads": 1}),
    ("linear", 2, {"feature_map": "dpfp", "nu": 2}),
    ("linear", 2, {"feature_map": "hadamard", "normalize": False, "num_kv_heads": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ranks", "options"), CASES)
def test_options(name: str, ranks: int, options: dict[str, Any]) -> None:
    compare(Subject.of(name, **options).mixer(), ranks)


@pytest.mark.slow
@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_compositions(name: str) -> None:
    """Whatever is added to a variant, ranks compute the same, or refuse."""
    for other in attnzoo.list_variants():
        try:
            subject = Subject.of(name, add=other)
            mixer = subject.mixer()
            split_heads(copy.deepcopy(mixer), Share(0, 2))
        except ValueError:
            continue
        compare(mixer, 2, subject.has("packs"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mla", {}),
        ("tpla", {}),
        ("mtla", {}),
        ("gqa", {"num_kv_heads": 1}),
        ("elitekv", {}),
        ("moh", {}),
        ("gated_deltanet", {}),
        ("mamba2", {}),
    ],
)
def test_decoding(name: str, options: dict[str, Any]) -> None:
    full, x = Subject.of(name, **options).mixer().eval(), inputs()
    parts = [copy.deepcopy(full) for _ in range(2)]

    @torch.no_grad()
    def run(rank: int, group: Any) -> tuple[Tensor, int, float]:
        mixer = parts[rank]
        split_heads(mixer, Share(rank, 2, group))
        cache = mixer.new_cache(len(x), LENGTH)
        ends = [0, 9, *range(10, LENGTH + 1)]
        pieces = [mixer(x[:, a:b], cache=cache) for a, b in pairwise(ends)]
        cost = mixer.cost(LENGTH, x.dtype)
        stored = len(x) * (LENGTH * cost.cache_bytes_per_token + cost.state_bytes)
        return torch.cat(pieces, dim=1), cache.nbytes, stored

    with torch.no_grad():
        alone = full(x)
    for y, held, stored in on_ranks(2, run):
        close(y, alone, "a decoded output", 1e-9)
        assert held == pytest.approx(stored, rel=0.05)  # blocks are held for the longest, whole


def test_caches_hold_the_own_part() -> None:
    """mla's latent is on every rank, the slices of tpla are each rank's own, and so are heads and states."""
    for name, share in (("mha", 0.5), ("mqa", 1.0), ("mla", 1.0), ("gla", 0.5)):
        full = Subject.of(name).mixer()
        part = copy.deepcopy(full)
        split_heads(part, Share(1, 2))
        assert part.new_cache(1, 8).nbytes == share * full.new_cache(1, 8).nbytes
    full = Subject.of("tpla", kv_lora_rank=16, qk_rope_head_dim=4).mixer()
    split_heads(full, Share(1, 2))
    assert full.new_cache(1, 8).nbytes == 8 * (16 // 2 + 4) * 8


def test_outputs_are_summands_without_a_group() -> None:
    for name in ("mha", "mla", "tpla", "moh", "gated_deltanet"):
        full, x = Subject.of(name, out_bias=True).mixer(), inputs()
        parts = [copy.deepcopy(full) for _ in range(2)]
        for rank, part in enumerate(parts):
            split_heads(part, Share(rank, 2))
        close(sum(part(x) for part in parts), full(x), name)


def small_model(layout: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return attnzoo.create_model(layout, vocab_size=31, dim=32, depth=2, num_heads=4, **options).double()


def model_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    collector = Collector()
    logits = model(tokens[:, :-1], Context(collector=collector))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss + 10 * collector.total()


@pytest.mark.parametrize("layout", ["mha,moh", "gated_deltanet,mla"])
def test_models_train_alike(layout: str) -> None:
    tokens = torch.randint(31, (3, 12))
    full = small_model(layout)
    parts = [copy.deepcopy(full) for _ in range(2)]

    def run(rank: int, group: Any) -> tuple[list[float], dict[str, Tensor]]:
        model, share = (full, Share(0, 1)) if group is None else (parts[rank], Share(rank, 2, group))
        split_heads(model, share)
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
        for _ in range(3):
            loss = model_loss(model, tokens)
            optimizer.zero_grad()
            loss.backward()
            sync_gradients(model, share)
            optimizer.step()
            losses.append(loss.item())
        marks = shards_of(model)
        state = {name: assemble(p, marks.get(name), share) for name, p in model.state_dict().items()}
        for name, p in model.named_parameters():
            state[f"moment of {name}"] = assemble(optimizer.state[p]["exp_avg"], marks.get(name), share)
            assert torch.equal(own(state[name], marks.get(name)), p), "taken apart it is another"
        return losses, state

    losses, state = run(0, None)
    for ours, found in on_ranks(2, run):
        assert ours == pytest.approx(losses, rel=1e-9)
        for name, value in state.items():
            close(found[name], value, name, 1e-7)  # Adam divides small gradients by their size


def test_refusals_name_the_layer_and_change_nothing() -> None:
    model = small_model("mha,dcmha")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"^launcher.tensor_parallel: 2 ranks .* layer 1 \(dcmha\): Compose: .*heads"
    ):
        split_heads(model, Share(0, 2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not shards_of(model) and model.mixers[0].share is None
    with pytest.raises(ValueError, match="4 heads do not divide among 3 ranks"):
        split_heads(small_model("mha"), Share(0, 3))
    with pytest.raises(ValueError, match="mlp_hidden: its 33 channels do not divide among 2 ranks"):
        split_heads(small_model("mha", mlp_hidden=33), Share(0, 2))


def test_the_listing_has_reasons() -> None:
    found = {name: splits(name) for name in attnzoo.list_variants()}
    assert all(found[name] is None for name in MUST)
    assert all(reason is None or ": " in reason for reason in found.values())
    assert "scores" in found["dcmha"]


def test_marks_survive_new_parameters() -> None:
    model = small_model("gqa")
    split_heads(model, Share(1, 2))
    marks = shards_of(model)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().clone()))
    assert marks and not shards_of(model)
    put_shards(model, marks)
    assert shards_of(model) == marks


class Alone(Share):
    """A share of which no other rank runs; its outputs have no meaning."""

    def total(self, z: Tensor) -> Tensor:
        return z * self.ranks


@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_costs_are_those_of_the_part(name: str) -> None:
    """FLOPs as a run of the rank counts them, and a cache of the rank's own heads."""
    for case, subject in Subject.cases(name).items():
        part = subject.mixer(impl="reference").eval()
        if case.endswith("-stack") or splits(name, **subject.options):
            continue
        part.split(Alone(1, 2))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            part(inputs())
        cost, tokens = part.cost(LENGTH), len(inputs()) * LENGTH
        runs, counted = cost.executed_flops + cost.weight_flops / tokens, counter.get_total_flops() / tokens
        assert runs == pytest.approx(counted) if cost.exact else counted <= runs * (1 + 1e-9), case
        assert cost.params == sum(p.numel() for p in part.parameters())
