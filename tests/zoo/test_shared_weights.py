"""Layers that share weights, whole matrices or heads: golden files, identities, counts, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import attnzoo
from attnzoo.attention.crosslayer.headshare import resolve
from attnzoo.attention.crosslayer.masa import fold
from attnzoo.testing.stack import Stack
from golden import spec_options
from layered import build_layers, check_layers, close, run, scattered
from tiny import D, H, T, same, tokens

FILES = Path(__file__).parents[1] / "golden"
TINY = {"vocab_size": 20, "dim": 16, "num_heads": 4}


@torch.no_grad()
def test_golden_headshare() -> None:
    file = torch.load(FILES / "headshare.pt", weights_only=True)
    given, options = file["extra"].pop("layers"), spec_options("headshare", file["spec_options"])
    heads, depth = options.pop("num_heads"), options.pop("num_layers")
    mixers = build_layers("headshare", depth, file["x"].shape[-1], heads, **options)
    d, roots = options["head_dim"], resolve(options["share_table"], depth, heads)
    for mixer, layer in zip(mixers, given, strict=True):
        own = [h for h in range(heads) if roots[mixer.site.layer, h] == (mixer.site.layer, h)]
        pieces = [*mixer.project.qkv_proj.pieces, *mixer.out.out_proj.pieces]
        for piece, symbol in zip(pieces, ("W_q", "W_k", "W_v", "W_o"), strict=True):
            w = layer["own_weights"][symbol]
            blocks = (w if symbol == "W_o" else w.T).reshape(heads, d, -1)
            piece.banks[-1].weight.copy_(blocks[own])
    check_layers(mixers, [layer["x"] for layer in given], [layer["y"] for layer in given])
    close(run(mixers[:1], [file["x"]])[0], file["y"])
    close(mixers[0].project.qkv_proj.weight[: heads * d].T, file["weights"]["W_q"])


@torch.no_grad()
def test_masa_combines_atoms() -> None:
    """Against sums in loops, with the MLP written out."""
    mixers = build_layers("masa", 3, share="qkvo", num_atoms=2, coef_dim=3)
    scattered(torch.nn.ModuleList(mixers))
    for mixer in mixers:
        pieces = [*mixer.project.qkv_proj.pieces, *mixer.out.out_proj.pieces]
        weight = torch.cat([mixer.project.qkv_proj.weight, mixer.out.out_proj.weight])
        want = []
        for piece in pieces:
            e = piece.embedding.weight[0]
            for layer in (piece.mlp.first, piece.mlp.second):
                z = layer.weight @ e + layer.bias
                e = z * 0.5 * (1 + torch.erf(z / 2**0.5))
            c = piece.mlp.last.weight @ e + piece.offset
            want.append(sum(c[s] * piece.atoms.weight[s] for s in range(2)))
        same(weight, torch.cat(want))
    assert pieces[0].embedding is pieces[3].embedding


@torch.no_grad()
def test_masa_reduces_to_independent_and_to_tied_layers() -> None:
    x = tokens()
    ours = build_layers("masa", 3, num_atoms=3, coef_param="free", share="qkvo")
    for i, mixer in enumerate(ours):
        plain = attnzoo.create("mha", D, H).double()
        atoms = [p.atoms.weight[i] for p in (*mixer.project.qkv_proj.pieces, *mixer.out.out_proj.pieces)]
        plain.project.qkv_proj.weight.copy_(torch.cat(atoms[:3]))
        plain.out.out_proj.weight.copy_(atoms[3])
        same(mixer(x), plain(x))  # coefficients start one-hot
    tied = build_layers("masa", 3, num_atoms=1, coef_param="free", share="qkvo")
    same(tied[0](x), tied[2](x))
    before = tied[1](x)
    piece = tied[1].project.qkv_proj.pieces[0]
    piece.atoms.weight.mul_(2)
    piece.offset.div_(2)
    same(tied[1](x), before)


@torch.no_grad()
@pytest.mark.parametrize("share", ["qkv", "qkvo"])
def test_masa_folds_its_coefficients(share: str) -> None:
    options = TINY | {"layout": "masa", "depth": 3, "num_atoms": 2, "coef_dim": 4, "share": share}
    model, x = scattered(attnzoo.create_model(**options).double()), torch.randint(0, 20, (2, 7))
    folded = attnzoo.create_model(**options, coef_param="free").double()
    folded.load_state_dict(fold(model))
    same(folded(x), model(x))
    kept = {name for name, _ in folded.named_parameters()}
    assert kept < {name for name, _ in model.named_parameters()} and not any("mlp.first" in n for n in kept)
    mixer = scattered(attnzoo.create("masa", D, H, share=share).double())
    alone = attnzoo.create("masa", D, H, share=share, coef_param="free").double()
    alone.load_state_dict(fold(mixer))
    same(alone(z := tokens()), mixer(z))


def test_masa_starts_tied_in_blocks() -> None:
    mixers = build_layers("masa", 6, num_atoms=2, coef_param="free")
    starts = [mixer.project.qkv_proj.pieces[0].offset.argmax().item() for mixer in mixers]
    assert starts == [0, 0, 0, 1, 1, 1]


@torch.no_grad()
def test_headshare_reduces_to_mha() -> None:
    ours = scattered(attnzoo.create("headshare", D, H, share_table=[]).double())
    plain = attnzoo.create("mha", D, H).double()
    plain.project.qkv_proj.weight.copy_(ours.project.qkv_proj.weight)
    plain.out.out_proj.weight.copy_(ours.out.out_proj.weight)
    x = tokens()
    same(ours(x), plain(x))


def test_headshare_chains_end_at_a_root_and_its_gradient_is_the_sum() -> None:
    table = [[[1, 0], [0, 2]], [[2, 1], [1, 0]]]
    mixers = build_layers("headshare", 3, share_table=table, share_parts="qkv")
    bank = mixers[0].project.qkv_proj.pieces[0].banks[0].weight
    grads = []
    for mixer, head in zip(mixers, (2, 0, 1), strict=True):
        w = mixer.project.qkv_proj.weight.unflatten(0, (3, H, D // H))[0, head]
        assert torch.equal(w, bank[2])
        grads.append(torch.autograd.grad((w * (head + 1)).sum(), bank, retain_graph=True)[0][2])
    x = tokens()
    total = sum(mixer(x).square().sum() for mixer in mixers)
    each = [torch.autograd.grad(m(x).square().sum(), bank)[0][2] for m in mixers]
    same(torch.autograd.grad(total, bank)[0][2], sum(each))
    assert len(grads) == 3


def test_headshare_shares_whole_groups() -> None:
    table = [[[1, 0], [0, 3]], [[1, 1], [0, 2]]]
    mixers = build_layers("headshare", 2, share_table=table, num_kv_heads=2)
    q, k, v = (
        z.unflatten(0, (-1, D // H)) for z in mixers[1].project.qkv_proj.weight.split([D, D // 2, D // 2])
    )
    q0, k0, v0 = (
        z.unflatten(0, (-1, D // H)) for z in mixers[0].project.qkv_proj.weight.split([D, D // 2, D // 2])
    )
    assert torch.equal(q[0], q0[3]) and torch.equal(q[1], q0[2])
    assert torch.equal(k[0], k0[1]) and torch.equal(v[0], v0[1]) and not torch.equal(k[1], k0[1])
    # only queries: any heads
    build_layers("headshare", 2, share_table=table[:1], num_kv_heads=2, share_parts="qo")


@pytest.mark.parametrize(
    "name, options, saved",
    [
        ("masa", {"coef_dim": 4}, None),
        ("masa", {"share": "qkvo", "coef_param": "free"}, 4 * 16 * 16 * (6 - 2) - 6 * 4 * 2),
        ("headshare", {"share_rate": 0.5}, 3 * 2 * 4 * 4 * 16),
        ("cla", {}, 3 * 2 * 16 * 16),
    ],
)
def test_models_count_what_is_shared_once_and_come_back(
    name: str, options: dict[str, Any], saved: int | None
) -> None:
    torch.manual_seed(0)
    model = scattered(attnzoo.create_model(name, depth=6, **TINY, **options)).eval()
    plain = attnzoo.create_model("mha", depth=6, **TINY)
    assert model.cost(8).params == sum(p.numel() for p in model.parameters())
    if saved is not None:
        assert plain.cost(8).params - model.cost(8).params == saved
    torch.manual_seed(1)
    again = attnzoo.create_model(**model.config).eval()
    again.load_state_dict(model.state_dict())
    x = torch.randint(0, 20, (2, 7))
    assert torch.equal(again(x), model(x))
    model.train()(x).square().sum().backward()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    optimiser.step()
    assert not torch.equal(again(x), model.eval()(x))


@torch.no_grad()
@pytest.mark.parametrize("bank", ["masa", "headshare"])
@pytest.mark.parametrize(
    "base, options",
    [
        ("gqa", {"num_kv_heads": 2}),
        ("kha", {}),
        ("linear", {}),
        ("cla", {}),
        ("sliding_window", {"window": 3}),
    ],
)
def test_banks_under_other_variants(bank: str, base: str, options: dict[str, Any]) -> None:
    stack = scattered(Stack(base, 3, D, H, add=bank, **options).double())
    x = tokens()
    cache = stack.new_cache(2, T)
    same(torch.cat([stack(z, cache=cache) for z in x.split([5, 1, 3], dim=1)], dim=1), stack(x))
    shared = {k for k in stack.mixers[0].state_dict() if "atoms" in k or "banks" in k}
    assert shared


def test_masa_layers_of_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layout: layer 1 needs 1 atoms of \(8, 16\) for 'k'"):
        attnzoo.create_model(["masa", {"name": "masa", "num_kv_heads": 2}], depth=2, **TINY)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("masa", {"num_atoms": 0}, r"num_atoms: must be in 1..num_layers=3, got 0"),
        ("masa", {"num_atoms": 4}, r"num_atoms: must be in 1..num_layers=3, got 4"),
        ("masa", {"coef_dim": 0}, r"coef_dim: must be at least 1, got 0"),
        ("masa", {"add": "headshare"}, r"add: headshare makes the weights of plain matrices"),
        ("mla", {"add": "masa"}, r"add: masa shares the matrices q/k/v .* mla has its own project"),
        ("headshare", {"share_rate": 1.5}, r"share_rate: must be in \[0, 1\], got 1.5"),
        ("headshare", {"share_parts": "qx"}, r"share_parts: must be some of q, k, v, o, each once, got 'qx'"),
        ("headshare", {"share_table": [[[0, 1], [1, 1]]]}, r"\(0, 1\) reads \(1, 1\) of a later layer"),
        ("headshare", {"share_table": [[[1, 1], [1, 2]], [[1, 2], [1, 1]]]}, r"share in a cycle"),
        ("headshare", {"share_table": [[[1, 4], [0, 0]]]}, r"heads below 4, got"),
        ("headshare", {"share_table": [[[1, 0], [0, 0]], [[1, 0], [0, 1]]]}, r"\(1, 0\) has sources"),
        (
            "headshare",
            {"share_table": [[[1, 0], [0, 0]]], "num_kv_heads": 2},
            r"shares only a part of key group 0 \(2 heads\)",
        ),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_layers(name, 3, **options)
