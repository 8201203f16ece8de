"""Conversions of whole models: every method, from every kind of source, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnzoo
from attnzoo.convert import METHODS, convert, convert_best
from zoo.test_convert import D, H, close, d, draw

DRAW = torch.Generator().manual_seed(2)
TEXT = {name: torch.randint(0, 61, (4, 33), generator=DRAW) for name in ("calibration", "held_out")}
WHOLE = {
    "gqa": {"num_kv_heads": 2},
    "transmla": {"kv_rank": 24},
    "mha2mla": {"num_rope_pairs": 2, "kv_rank": 20},
    "elitekv": {"num_rope_pairs": 2, "kv_rank": 20},
    "xecomla": {"kv_rank": 24, "q_rank": 24},
    "dha": {"budget": 10},
    "tpla": {},
    "tensorllm": {"rank_model": 24, "rank_head": 6},
    "headshare": {},
    "masa": {"num_atoms": 2},
}
EXACT = {
    "gqa": {"num_kv_heads": 4},
    "mha2mla": {"num_rope_pairs": 4, "kv_rank": 32},
    "elitekv": {"num_rope_pairs": 4, "kv_rank": 32},
    "dha": {"budget": 24},
    "tensorllm": {"rank_model": 32, "rank_head": 8},
    "headshare": {"share_rate": 0.0},
    "masa": {"num_atoms": 3, "share": "qkvo"},
}


def model(method: str, **options: Any) -> torch.nn.Module:
    name = "mla" if "mla" in METHODS[method].sources else "mha"
    made = attnzoo.create_model(name, vocab_size=61, dim=D, depth=3, num_heads=H, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    return made


def test_every_method_is_tried() -> None:
    assert set(WHOLE) == set(METHODS)


@pytest.mark.parametrize("method", WHOLE)
def test_a_model_converts(method: str) -> None:
    source = model(method)
    new, report = convert(source, method, **TEXT, **WHOLE[method])
    assert report.logit_change > 0
    assert all(torch.isfinite(torch.tensor(report.loss)))
    again = attnzoo.create_model(**new.config).double()
    again.load_state_dict(new.state_dict())
    assert torch.equal(again(TEXT["held_out"]), new(TEXT["held_out"]))


@pytest.mark.parametrize("method", EXACT)
def test_a_model_converts_exactly(method: str) -> None:
    source = model(method)
    new, report = convert(source, method, **TEXT, **EXACT[method])
    close(new(TEXT["held_out"]), source(TEXT["held_out"]))
    assert report.logit_change < 1e-9 and abs(report.loss[0] - report.loss[1]) < 1e-9


def sharp(name: str, heads: int = H, **options: Any) -> torch.nn.Module:
    """A model whose attention and biases matter."""
    made = attnzoo.create_model(name, vocab_size=61, dim=D, depth=2, num_heads=heads, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(4) if p.dim() > 1 else p.add_(0.3 * draw(*p.shape))
    return made


SOURCES = {
    "mqa": ("mqa", {}),
    "biases": ("gqa", {"num_kv_heads": 2, "qkv_bias": True, "out_bias": True}),
    "out": ("gqa", {"num_kv_heads": 2, "out_bias": True}),
    "wide": ("fixed_head_size", {"head_dim": 12}),
    "few": ("sqa", {"heads": 8, "num_kv_heads": 2}),
    "tiled": ("sqa", {"heads": 8, "setting": "rsqa"}),
    "unplaced": ("mha", {"pos": "none"}),
    "unplaced biases": ("mqa", {"pos": "none", "qkv_bias": True}),
}


@pytest.mark.parametrize("method", [*EXACT, "xecomla"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_converts_exactly(source: str, method: str) -> None:
    """Head counts and widths, biases and absent positions go with the weights."""
    name, options = SOURCES[source]
    model = sharp(name, **options)
    project, rope = model.mixers[0].project, options.get("pos") != "none"
    G, width = project.heads[1], project.widths[0]
    full = {"num_rope_pairs": width // 2 if rope else 0, "kv_rank": min(D, (2 - rope) * G * width)}
    wanted = {
        "gqa": {"num_kv_heads": G},
        "mha2mla": full,
        "elitekv": full,
        "dha": {"budget": 4 * G},
        "tensorllm": {"rank_model": D, "rank_head": width},
        "headshare": {"share_rate": 0.0},
        "masa": {"num_atoms": 2, "share": "qkvo"},
        "xecomla": {"kv_rank": min(D, 2 * G * width), "q_rank": min(D, project.heads[0] * width)},
    }[method]
    if options.get("qkv_bias") and method == "tensorllm":
        with pytest.raises(ValueError, match=r"^qkv_bias: tensorllm makes factors .*layer 0 has them"):
            convert(model, method, **TEXT, **wanted)
        return
    new, report = convert(model, method, **TEXT, **wanted)
    if method == "xecomla" and rope:
        assert new.mixers[0].options["qk_rope_head_dim"] == width // 4 * 2
        return
    assert report.weight_error < 1e-12
    close(new(TEXT["held_out"]), model(TEXT["held_out"]))


def test_the_best_of_several_options_is_taken() -> None:
    """One cache, split between rotary pairs and latent."""
    source = sharp("gqa", num_kv_heads=2)
    splits = [{"num_rope_pairs": r, "kv_rank": 32 - 4 * r} for r in (4, 2, 1)]
    new, report = convert_best(source, "elitekv", TEXT["calibration"], splits, TEXT["held_out"])
    losses = [
        convert(source, "elitekv", TEXT["calibration"], TEXT["calibration"], **own)[1].loss[1]
        for own in splits
    ]
    assert len(set(losses)) == 3 and report.options == splits[losses.index(min(losses))]
    assert new.mixers[0].options["kv_rank"] == report.options["kv_rank"] and report.loss is not None
    with pytest.raises(ValueError, match=r"^candidates: .* got none"):
        convert_best(source, "elitekv", TEXT["calibration"], [])


def test_weight_error_is_that_of_the_heads_products() -> None:
    source = sharp("gqa", num_kv_heads=2)
    new, report = convert(source, "gqa", num_kv_heads=1)
    change = norm = 0.0
    for ours, theirs in zip(new.mixers, source.mixers, strict=True):
        (q, k, v), (q0, k0, v0) = (m.project.qkv_proj.weight.split(m.project.sizes) for m in (ours, theirs))
        outs = [m.out.out_proj.weight.split(d, 1) for m in (ours, theirs)]
        for h in range(H):
            g = slice(h // 2 * d, h // 2 * d + d)
            new_qk, old_qk = q.split(d)[h].T @ k / d**0.5, q0.split(d)[h].T @ k0[g] / d**0.5
            new_vo, old_vo = outs[0][h] @ v, outs[1][h] @ v0[g]
            change += (new_qk - old_qk).square().sum() + (new_vo - old_vo).square().sum()
            norm += old_qk.square().sum() + old_vo.square().sum()
    assert (
        report.weight_error == pytest.approx(float((change / norm).detach()) ** 0.5)
        and report.weight_error > 0.1
    )


@pytest.mark.parametrize(
    "source, method, options",
    [
        (("gqa", {"num_kv_heads": 2}), "transmla", {"kv_rank": 3 * d, "q_rank": H * d, "freqfold": 2}),
        (("mla", {"q_lora_rank": 12}), "tpla", {"latent_shards": 4}),
        (("mla", {"latent_norm": False}), "tpla", {"basis": "hadamard"}),
        (("mla", {"qkv_bias": True}), "tpla", {}),
    ],
    ids=str,
)
def test_a_basis_is_no_error_of_weights(source: tuple, method: str, options: dict[str, Any]) -> None:
    _, report = convert(sharp(source[0], **source[1]), method, **TEXT, **options)
    assert report.weight_error < 1e-12 < report.logit_change


def test_heads_that_are_copies_share_exactly() -> None:
    source = sharp("gqa", num_kv_heads=2)
    first, second = (mixer.project.qkv_proj.weight.data for mixer in source.mixers)
    outs = [mixer.out.out_proj.weight.data for mixer in source.mixers]
    for to, of, size in ((0, 2, 2), (4, 5, 1), (6, 7, 1)):  # queries 0 and 1, key 0, value 0 of layer 1
        second[to * d : (to + size) * d] = first[of * d : (of + size) * d]
    outs[1][:, : 2 * d] = outs[0][:, 2 * d : 4 * d]
    new, _ = convert(source, "headshare", **TEXT, share_rate=0.25)
    assert new.config["share_table"] == [[[1, 0], [0, 2]], [[1, 1], [0, 3]]]
    close(new(TEXT["held_out"]), source(TEXT["held_out"]))


@pytest.mark.parametrize("name, options", [SOURCES["biases"], SOURCES["mqa"], SOURCES["few"]], ids=str)
def test_fusion_starts_at_the_source(name: str, options: dict[str, Any]) -> None:
    source = sharp(name, **options)
    new, _ = convert(source, "dha", **TEXT, budget=4, fusion=True)
    close(new(TEXT["held_out"]), source(TEXT["held_out"]))
    assert new.mixers[0].options["fusion"] and new.mixers[0].project.groups[0] == [new.config["num_heads"]]


@pytest.mark.parametrize("q_rank", [0, D])
def test_one_key_head_is_an_mla_with_its_biases(q_rank: int) -> None:
    """With nothing but the rotary slot no rotation is lost."""
    source = sharp("mqa", qkv_bias=True, out_bias=True)
    new, _ = convert(source, "transmla", **TEXT, kv_rank=d, q_rank=q_rank)
    close(new(TEXT["held_out"]), source(TEXT["held_out"]))


@pytest.mark.parametrize("norm", [True, False])
def test_an_mla_of_any_widths_shards(norm: bool) -> None:
    sizes = {"kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 2}
    source = sharp("mla", v_head_dim=5, latent_norm=norm, qkv_bias=True, **sizes)
    new, _ = convert(source, "tpla", **TEXT, latent_shards=1)
    close(new(TEXT["held_out"]), source(TEXT["held_out"]), 1e-6)  # a norm per slice has an eps per slice
    new, report = convert(source, "tpla", **TEXT, latent_shards=3)
    assert report.logit_change > 0 and new.mixers[0].options["latent_shards"] == 3


def test_frame_options_are_kept() -> None:
    source = model("gqa", window=7, n_sink=2, rope_theta=500.0)
    new, _ = convert(source, "elitekv", **TEXT, **EXACT["elitekv"])
    close(new(TEXT["held_out"]), source(TEXT["held_out"]))


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("gka", {}, "method: 'gka'"),
        ("gqa", {}, "num_kv_heads: gqa needs it"),
        ("gqa", {"num_kv_heads": 3}, "num_kv_heads: must divide the 4 key heads of the source, got 3"),
        ("gqa", {"num_kv_heads": 2, "rank": 3}, "option: 'rank' is none of gqa"),
        ("gqa", {"num_kv_heads": 3, "pooling": "svd"}, "num_kv_heads: must divide the 4 key heads .*, got 3"),
        ("gqa", {"num_kv_heads": 2, "pooling": "max"}, "pooling: must be one of"),
        ("transmla", {"kv_rank": 99}, "kv_rank: must be in 1..56, got 99"),
        ("transmla", {"kv_rank": 9, "freqfold": 3}, "freqfold: must divide the 4 pairs"),
        ("transmla", {"kv_rank": 9, "freqfold": 2, "collapse": 4}, "collapse: must divide freqfold=2, got 4"),
        ("elitekv", {"num_rope_pairs": 5, "kv_rank": 9}, "num_rope_pairs: must be in 0..4, got 5"),
        ("elitekv", {"num_rope_pairs": 2, "kv_rank": 0}, "kv_rank: must be in 1..32, got 0"),
        ("xecomla", {"kv_rank": 9, "q_rank": 99}, "q_lora_rank: must be in 1..32, got 99"),
        ("dha", {"budget": 5}, "budget: must be in 6..24 heads, got 5"),
        ("tpla", {"latent_shards": 3}, "latent_shards: must divide the latent's 32 channels, got 3"),
        ("tensorllm", {"rank_model": 40, "rank_head": 8}, "rank_model: must be in 1..32, got 40"),
        ("masa", {"num_atoms": 4}, "num_atoms: must be in 1..3 layers, got 4"),
        ("headshare", {"share_rate": 1.5}, "share_rate: must be in 0..1, got 1.5"),
        (
            "xecomla",
            {"kv_rank": 9, "q_rank": 9, "qk_rope_head_dim": 0},
            "qk_rope_head_dim: must be positive as the source has rotary positions, got 0",
        ),
    ],
)
def test_refusals(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        convert(model(method if method in METHODS else "gqa"), method, TEXT["calibration"], **options)


def test_a_layer_that_cannot_be_read_is_named() -> None:
    mixed = attnzoo.create_model("mha,linear,mha", vocab_size=61, dim=D, depth=3, num_heads=H)
    with pytest.raises(ValueError, match="layer 1 is 'linear'"):
        convert(mixed, "gqa", num_kv_heads=2)
    gated = attnzoo.create_model("mha", vocab_size=61, dim=D, depth=2, num_heads=H, output_gate="headwise")
    with pytest.raises(ValueError, match="layer 0 has a Gate"):
        convert(gated, "gqa", num_kv_heads=2)
    with pytest.raises(ValueError, match="calibration: transmla reads activations"):
        convert(model("gqa"), "transmla", kv_rank=8)
    with pytest.raises(ValueError, match=r"^num_rope_pairs: must be 0 with .* got 1"):
        convert(model("gqa", pos="none"), "mha2mla", TEXT["calibration"], num_rope_pairs=1, kv_rank=8)
    with pytest.raises(ValueError, match=r"^num_heads: .* one number of query heads .*got \[4, 2\]"):
        unlike = attnzoo.create_model("mha,sqa", vocab_size=61, dim=D, depth=2, num_heads=H)
        convert(unlike, "gqa", num_kv_heads=1)
