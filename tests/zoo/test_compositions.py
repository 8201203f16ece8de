"""Variants on top of variants: what passes the whole suite, what is refused, and what a composition's card
says.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnzoo
from attnzoo import registry
from attnzoo.attention.base import Mixer
from attnzoo.context import Collector, Context
from attnzoo.testing import PROPERTIES, Subject
from attnzoo.testing.subject import DIM, HEADS
from tiny import D, H, build, same, tokens

WINDOWED = {"window": 5, "state_size": 4}
SOUND: list[tuple[str, dict[str, Any]]] = [
    ("mla", {"add": "efficient_dlm", "block_size": 4, "qkv_bias": True}),
    ("efficient_dlm", {"add": ("kha", "moh"), "block_size": 5, "window": 6}),
    ("kvt", {"add": "moh", "kv_variant": "kv_pos"}),
    ("moh", {"add": "sqa"}),
    ("recurformer", {"add": "moh", "recurrent_fraction": 0.5, "state_size": 8, "qkv_bias": True}),
    ("l2vit", {**attnzoo.card("l2vit").small, "add": "moh"}),
    ("flare", {"add": "sqa", "num_latents": 6, "chunk_size": 4}),
    ("hymba", {"add": "cca", **WINDOWED}),
    ("tpla", {"add": "recurrent_memory_chunked", "chunk": 4, "mem_slots": 2}),
    ("kvt", {"add": "recurrent_memory_chunked", "kv_variant": "kv_pos", "chunk": 4, "mem_slots": 2}),
    ("gla", {"add": "fixed_head_size", "chunk_size": 4}),
    ("sqa", {"add": "masa", "num_query_heads": 2, "num_kv_heads": 4}),
    ("flatten", {"add": "linear", "linear.normalize": False, "feature_map": "hedgehog", "learned_pos": True}),
    ("linear", {"add": ("kha", "kv_shift"), "feature_map": "hedgehog", "kind": "linear"}),
    ("gated_deltanet", {"num_kv_heads": 2, "num_v_heads": 8, "pos": "rope", "qkv_bias": True}),
    ("retnet", {"add": "kha", "output_gate": "elementwise", "chunk_size": 4}),
]

PLAIN = "reads a plain sum"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("linear", {"add": "rala"}, rf"^add: rala {PLAIN}, linear reads it its own way; leave one of them out$"),
    ("rala", {"add": "linear"}, rf"^add: linear {PLAIN}, rala gates it"),
    ("flatten", {"add": "mala"}, rf"^add: mala {PLAIN}, flatten reads it its own way"),
    ("flatten", {"add": "flare"}, rf"^add: flatten {PLAIN}, flare gates it"),
    ("flatten", {"add": "based"}, rf"^add: based {PLAIN}, flatten reads it its own way"),
    ("mhla_linear", {"add": "linear"}, rf"^add: linear {PLAIN}, mhla_linear sums otherwise"),
    ("l2vit", {"add": "lightning_attention", "layer_idx": 1, "num_layers": 2}, rf"^add: l2vit {PLAIN}"),
    ("kv_shift", {"add": "dynamic_rank"}, r"^add: the previous token's key and value do not exist"),
    (
        "cca",
        {"add": "dynamic_rank", "value_shift": False},
        r"^add: QKConv mixes keys with those of the tokens before",
    ),
    (
        "mla",
        {"add": "cca", "value_shift": False, "conv": False},
        r"^add: mla makes heads of \(8, 4, 8\) channels .*wants \(4, 4, 4\)",
    ),
    ("hymba", {"add": "sqa"}, r"^add: two branches of 4 heads, 16 wide, are averaged, got 2 heads.* sqa;"),
    ("hymba", {"add": "cca", "v_expand": 1}, r"^add: two branches of 4 heads, 8 wide, .*4 wide, with cca;"),
    ("recurrent_memory_chunked", {"add": "dcmha"}, r"^mem_slots: a score of its own compares tokens.*got 32"),
    (
        "mixattention",
        {"add": "sliding_window"},
        r"^add: mixattention presets window=1024, sliding_window 128; set window, or leave",
    ),
    ("l2vit", {"add": "tensorllm", "cpe_kernel": 0}, r"^qkv_bias: .* got True by l2vit; leave l2vit or"),
    ("l2vit", {"add": "tensorllm", "cpe_kernel": 0, "qkv_bias": True}, r"^qkv_bias: .*, got True; leave it"),
    ("masa", {"layer_idx": 1}, r"^layer_idx: must be in 0\.\.num_layers-1=0, got 1; set num_layers"),
    ("mha", {"num_layers": 0}, r"^num_layers: must be an integer of at least 1, got 0"),
    ("mha", {"chunk_size": 4}, r"^chunk_size: queries meet their keys at once.*got 4"),
    ("grassmann", {"pos": "rope"}, r"^pos: positions enter by this architecture's own options.*got 'rope'"),
]


@pytest.mark.parametrize("name, options", [pytest.param(n, o, id=f"{n}-{'-'.join(o)}") for n, o in SOUND])
@pytest.mark.parametrize("prop", PROPERTIES)
def test_sound(prop: str, name: str, options: dict[str, Any]) -> None:
    PROPERTIES[prop](Subject.of(name, **options))


@pytest.mark.parametrize("name, options, message", REFUSED, ids=str)
def test_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attnzoo.create(name, DIM, HEADS, **options)


STACKS = {
    "spectformer": {**attnzoo.card("spectformer").small, "add": "dcmha", "rank": 1},
    "l2vit": {**attnzoo.card("l2vit").small, "add": "kvt", "cpe_kernel": 0},
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("prop", PROPERTIES)
def test_layers_of_another_kind_leave_a_variant_to_those_that_fit(prop: str, name: str) -> None:
    subject = Subject.of(name, 2, **STACKS[name])
    PROPERTIES[prop](subject)
    assert {mixer.options["add"] for mixer in subject.mixer().mixers} == {(), (STACKS[name]["add"],)}


def test_a_variant_that_no_layer_fits_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^add: 'dcmha' changes ScoreAttention, 'spectformer' is OwnAttention"
    ):
        attnzoo.create("spectformer", DIM, HEADS, add="dcmha")
    with pytest.raises(ValueError, match=r"^add: 'gla' changes RecurrentAttention, 'spectformer' is"):
        attnzoo.create("spectformer", DIM, HEADS, add="gla", num_layers=4)
    options = {"vocab_size": 9, "dim": DIM, "depth": 4, "num_heads": HEADS, "add": "dcmha"}
    mixers = attnzoo.create_model("spectformer", **options, rank=1, **{"dcmha.hidden_mult": 3}).mixers
    assert [mixer.options["add"] for mixer in mixers] == [(), *[("dcmha",)] * 3]
    assert {(mixer.options["rank"], mixer.options["hidden_mult"]) for mixer in mixers[1:]} == {(1, 3)}
    with pytest.raises(ValueError, match=r"^option: 'nonsense'"):
        attnzoo.create_model("spectformer", **options, nonsense=1)


def test_the_caller_decides_between_presets() -> None:
    assert attnzoo.create("mixattention", DIM, HEADS, add="sliding_window", window=7).options["window"] == 7
    mixer = attnzoo.create("l2vit", DIM, HEADS, add="tensorllm", cpe_kernel=0, qkv_bias=False)
    assert not mixer.options["qkv_bias"] and mixer.options["out_bias"]


def test_a_composition_has_the_traits_that_all_members_have() -> None:
    for name, add in (("mla", "efficient_dlm"), ("efficient_dlm", ("kha", "moh"))):
        card = registry.card(name, add)
        assert card.name == name and not card.traits["causal"] and not card.traits["decodes"]
        assert card.traits["packs"] and card.traits["trains"]
    assert registry.card("mla").traits["causal"] and registry.card("mha", ("kha",)).traits["causal"]
    assert "chunk_size" not in registry.card("linear", ("mhla_linear",)).defaults
    assert registry.card("mha", ("cla",)).layers == registry.card("cla").layers


def gate(mixer: Mixer, x: torch.Tensor) -> torch.Tensor:
    """The weights ``(B, T, H)`` of the heads."""
    collector = Collector()
    mixer(x, Context(collector=collector))
    return collector.stats["moh/gate"][0]


def test_routers_choose_by_unrounded_scores() -> None:
    """Two heads whose scores differ by less than bf16 tells apart."""
    mixer, x = build("moh", shared_heads=0, active_heads=1).float(), torch.ones(1, 1, D)
    mixer.combine[0].scores["routed"].weight.zero_()[2] = (1 + 1e-4) / D
    mixer.combine[0].scores["routed"].weight[1] = 1 / D
    assert int(gate(mixer, x).argmax()) == 2
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gate(mixer, x)
    same(rounded, gate(mixer, x))


def test_one_routed_head_needs_no_router() -> None:
    mixer = build("moh", shared_heads=3)
    assert "routed" not in mixer.combine[0].scores and "balance" in mixer.combine[0].scores
    x = tokens()
    share = 2 * (x @ mixer.combine[0].scores["balance"].weight.T).softmax(-1)
    same(gate(mixer, x)[..., 3], share[..., 1])


@pytest.mark.parametrize("q_rank", [0, 6])
def test_biases_of_latents_are_those_of_maps_from_the_stream(q_rank: int) -> None:
    mixer, plain = (build("mla", q_lora_rank=q_rank, qkv_bias=bias) for bias in (True, False))
    names = {name for name, _ in mixer.named_parameters()} - {name for name, _ in plain.named_parameters()}
    first = "q_down" if q_rank else "q_up"
    assert names == {f"project.{first}.bias", "project.kv_down.bias"}
    for name in names:
        mixer.get_parameter(name).normal_()
    # a stream with a channel of ones, whose weights are the biases
    wide = attnzoo.create("mla", D + H, H, q_lora_rank=q_rank, qk_nope_head_dim=4, v_head_dim=4,
                          qk_rope_head_dim=2, kv_lora_rank=16).double().requires_grad_(False)  # fmt: skip
    for module, other in zip(mixer.project.children(), wide.project.children(), strict=True):
        if other.weight.shape[1] == D + H:
            other.weight.zero_()
            other.weight[:, :D] = module.weight
            other.weight[:, D] = module.bias
        else:
            other.weight.copy_(module.weight)
    for side in ("q", "kv"):
        gain = getattr(mixer.project, f"{side}_gain", None)
        if gain is not None:
            getattr(wide.project, f"{side}_gain").copy_(gain)
    wide.out.out_proj.weight.zero_()[:D] = mixer.out.out_proj.weight
    x = tokens()
    one = torch.zeros(*x.shape[:2], H, dtype=x.dtype)
    one[..., 0] = 1
    same(wide(torch.cat([x, one], dim=-1))[..., :D], mixer(x))
