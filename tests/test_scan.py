"""The scan: every transition class against foreign outputs and against its own other forms; what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attnzoo_kernels.scan import scan, scan_flops
from scans import CLASSES, Operands, assert_same, forms, gradients, make, runs, start

GOLDEN = Path(__file__).parent / "golden"
PACKED = ["a_nodecay", "a_scalar", "b_diag", "c_delta", "c_gated", "c_diag", "d_dplr"]


@pytest.mark.parametrize("name", ["a_const", *PACKED])
def test_golden(name: str) -> None:
    golden = torch.load(GOLDEN / f"scan_{name}.op.pt", weights_only=True)
    x, expected = golden["inputs"], golden["outputs"]
    initial = x.pop("initial_state", None)
    for form in forms(x):
        o, S = scan(**x, output_final_state=True, **form)
        assert_same({"o": o}, {"o": expected["o"]})
        if initial is None:
            continue
        assert_same({"S": S}, {"S": expected["S"]})
        do, dS = golden["grads"]["do"], golden["grads"]["dS"]
        wanted = {key: value for key, value in golden["grads"].items() if key not in ("do", "dS")}
        wanted |= {"o": expected["o_init"], "S": expected["S_init"]}
        assert_same(gradients(x | {"initial_state": initial}, do, dS, **form), wanted)


@pytest.mark.parametrize("name", PACKED)
def test_golden_packed(name: str) -> None:
    golden = torch.load(GOLDEN / f"scan_{name}.op.pt", weights_only=True)
    x = {key: value[:1] for key, value in golden["inputs"].items() if key != "initial_state"}
    packed = golden["packed"]
    for form in forms(x):
        o, _ = scan(**x, segments=packed["segment_ids"], **form)
        assert_same({"o": o}, {"o": packed["o"]})
        for document, state in enumerate(packed["S_per_document"]):
            end = int((packed["segment_ids"] <= document).sum())
            prefix = {key: value[:, :end] for key, value in x.items()}
            segments = packed["segment_ids"][:, :end]
            _, S = scan(**prefix, segments=segments, output_final_state=True, **form)
            assert_same({"S": S[0]}, {"S": state})


@pytest.mark.parametrize(
    ("case", "names"),
    {
        "A": {"g": "g_s"},
        "B": {"g": "g_d"},
        "C0": {"beta": "beta"},
        "C1": {"g": "g_s", "beta": "beta"},
        "C2": {"g": "g_d", "beta": "beta"},
        "D": {"g": "g_D", "a": "a", "e": "e"},
    }.items(),
)
def test_golden_extreme(case: str, names: dict[str, str]) -> None:
    golden = torch.load(GOLDEN / "scan_all_long_extreme.op.pt", weights_only=True)
    names = names | {name: name for name in ("q", "k", "v", "initial_state")}
    x = {ours: golden["inputs"][theirs] for ours, theirs in names.items()}
    for form in forms(x):
        o, S = scan(**x, output_final_state=True, **form)
        assert_same({"o": o, "S": S}, golden["outputs"][case])


def test_golden_grouped_heads() -> None:
    golden = torch.load(GOLDEN / "scan_c_diag_grouped.op.pt", weights_only=True)
    x = golden["inputs"]
    groups = x["v"].shape[2] // x["q"].shape[2]
    x |= {name: x[name].repeat_interleave(groups, 2) for name in ("q", "k")}
    for form in forms(x):
        o, S = scan(**x, output_final_state=True, **form)
        assert_same({"o": o, "S": S}, golden["outputs"])


def test_golden_selective_scan() -> None:
    """A decay per channel and state entry is the diagonal class with a head of width 1 per channel."""
    golden = torch.load(GOLDEN / "scan_e_selective.op.pt", weights_only=True)
    x = {name: value.requires_grad_() for name, value in golden["inputs"].items()}
    step = torch.nn.functional.softplus(x["delta_raw"] + x["delta_bias"])  # B,T,channels
    q, k = (x[name].unsqueeze(2).expand(-1, -1, step.shape[2], -1) for name in ("C", "B"))
    g, v = step.unsqueeze(-1) * x["A"], (step * x["u"]).unsqueeze(-1)
    o, S = scan(q, k, v, g, scale=1.0, output_final_state=True, chunk_size=8)
    y = (o.squeeze(-1) + x["D"] * x["u"]) * torch.nn.functional.silu(x["z"])
    assert_same({"y": y, "h": S.squeeze(-1).mT}, golden["outputs"])
    grads = dict(golden["grads"])
    found = torch.autograd.grad(y, list(x.values()), grads.pop("do"))
    assert_same({f"d{name}": grad for name, grad in zip(x, found, strict=True)}, grads)


@pytest.mark.parametrize("T", [1, 2, 5, 37, 64, 70])
@pytest.mark.parametrize("name", CLASSES)
def test_forms_agree(name: str, T: int) -> None:
    x = make(name, T=T)
    x["initial_state"] = start(x)
    do, dS = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])
    for segments in (None, runs(2, T)):
        expected = gradients(x, do, dS, segments=segments, form="recurrent")
        for form in [{"chunk_size": 7}, *forms(x)[1:]]:
            assert_same(gradients(x, do, dS, segments=segments, **form), expected, 1e-10)


@pytest.mark.parametrize("name", CLASSES)
def test_defaults(name: str) -> None:
    x = make(name)
    K = x["q"].shape[-1]
    initial = torch.zeros(2, 2, K, 4, dtype=torch.float64)
    o, S = scan(**x)
    assert S is None
    assert_same({"o": o}, {"o": scan(**x, initial_state=initial, scale=K**-0.5, form="recurrent")[0]})


@pytest.mark.parametrize("name", CLASSES)
def test_carried_state(name: str) -> None:
    """Two calls, one of a single token too, are one call; also when a document runs across the cut."""
    x = make(name)
    segments = runs(2, 37)
    o, S = scan(**x, segments=segments, output_final_state=True, chunk_size=16)
    for cut in (1, 20, 36):

        def part(first: bool, cut: int = cut) -> Operands:
            return {n: v if v.dim() == 1 else v[:, :cut] if first else v[:, cut:] for n, v in x.items()}

        options = {"output_final_state": True, "chunk_size": 16}
        before, state = scan(**part(True), segments=segments[:, :cut], **options)
        rest = segments[:, cut:] - segments[:, cut - 1 : cut]  # run 0 owns the carried state
        after, last = scan(**part(False), segments=rest, initial_state=state, **options)
        assert_same({"o": torch.cat([before, after], 1), "S": last}, {"o": o, "S": S})


@pytest.mark.parametrize("name", CLASSES)
def test_packed_documents_are_separate(name: str) -> None:
    lengths = [3, 1, 17, 1, 15]
    x = make(name, B=1)
    x["initial_state"] = start(x)
    segments = torch.arange(1, 6).repeat_interleave(torch.tensor(lengths))[None]
    packed, S = scan(**x, segments=segments, output_final_state=True, chunk_size=8)
    initial = x.pop("initial_state")
    parts = {n: [v] * 5 if v.dim() == 1 else v.split(lengths, 1) for n, v in x.items()}
    options = {"output_final_state": True, "form": "recurrent"}
    alone = [scan(**{n: v[i] for n, v in parts.items()}, **options) for i in range(5)]
    assert_same({"o": packed, "S": S}, {"o": torch.cat([o for o, _ in alone], 1), "S": alone[-1][1]})
    # With run 0 first, the first document, and no other, goes on from the initial state.
    packed, _ = scan(**x, initial_state=initial, segments=segments - 1, chunk_size=8)
    first, _ = scan(**{n: v[0] for n, v in parts.items()}, initial_state=initial, form="recurrent")
    assert_same({"o": packed}, {"o": torch.cat([first, *[o for o, _ in alone[1:]]], 1)})


@pytest.mark.parametrize(("T", "chunk_size"), [(1, 64), (2, 1), (37, 64), (64, 16), (70, 64), (65, 24)])
@pytest.mark.parametrize("name", CLASSES)
def test_flops(name: str, T: int, chunk_size: int) -> None:
    x = make(name, B=1, T=T, H=3, K=6, V=4)
    with FlopCounterMode(display=False) as counter:
        scan(**x, chunk_size=chunk_size, segments=runs(1, T), initial_state=start(x))
    flops = scan_flops(CLASSES[name], T, 3, 6, 4, chunk_size)
    assert counter.get_total_flops() == flops.executed


@pytest.mark.parametrize("kind", dict.fromkeys(CLASSES.values()))
def test_method_flops(kind: str) -> None:
    """Counted pair by pair on two chunks of 32 tokens and one of 31; under a diagonal gate chunks have 16."""
    K, V = 6, 4
    chunks = (32, 32, 31) if kind in ("scalar", "delta") else (16,) * 5 + (15,)
    pairs = sum(1 for C in chunks for r in range(C) for j in range(C) if j <= r)
    strict = pairs - 95
    products = {  # pairs that are scored, pairs that are applied to values, products with the state
        "scalar": (pairs, pairs, 2),
        "diagonal": (strict, pairs, 2),
        "delta": (pairs + strict, pairs + strict, 3),
        "delta_diagonal": (2 * strict, pairs + strict, 3),
        "rank_one": (4 * strict, 2 * pairs + 2 * strict, 4),
    }
    scored, applied, state = products[kind]
    expected = 2 * (scored * K + applied * V + 95 * state * K * V)
    assert scan_flops(kind, 95, 3, K, V, chunk_size=32).method == 3 * expected
    if kind in ("scalar", "delta"):  # of 6 heads, each 3 repeat one q and k
        shared = scan_flops(kind, 95, 6, K, V, chunk_size=32, groups=2)
        assert shared.method == 6 * expected - 4 * 2 * scored * K
        assert shared.executed == scan_flops(kind, 95, 6, K, V, chunk_size=32).executed
    else:
        with pytest.raises(ValueError, match=r"groups.*got 2"):
            scan_flops(kind, 95, 6, K, V, chunk_size=32, groups=2)


BAD = {
    "q: needs shape": {"q": torch.zeros(2, 5, 6)},
    "k: needs shape": {"k": torch.zeros(2, 5, 2, 7)},
    "v: needs shape": {"v": torch.zeros(2, 4, 2, 4)},
    "v: needs a floating-point": {"v": torch.zeros(2, 5, 2, 4, dtype=torch.int64)},
    "k: needs q's device": {"k": torch.zeros(2, 5, 2, 6, device="meta")},
    "g: needs shape": {"g": torch.zeros(2, 5)},
    "beta: needs shape": {"beta": torch.zeros(2, 5, 2, 1)},
    "beta: cannot go with e and a": {"beta": torch.zeros(2, 5, 2), "e": torch.zeros(2, 5, 2, 6)},
    "e: is needed with a": {"e": None},
    "a: is needed with e": {"a": None, "e": torch.zeros(2, 5, 2, 6)},
    "e: needs shape": {"e": torch.zeros(2, 5, 2, 4)},
    "a: needs shape": {"a": torch.zeros(2, 5, 6)},
    "initial_state: needs shape": {"initial_state": torch.zeros(2, 2, 4, 6)},
    "initial_state: needs a floating-point": {"initial_state": torch.zeros(2, 2, 6, 4, dtype=torch.int32)},
    "segments: needs int64": {"segments": torch.zeros(2, 5, dtype=torch.int32)},
    "segments: needs shape": {"segments": torch.zeros(5, dtype=torch.int64)},
    "segments: needs q's device": {"segments": torch.zeros(2, 5, dtype=torch.int64, device="meta")},
    "chunk_size: needs an integer": {"chunk_size": 0},
    "form: needs one of": {"form": "parallel"},
    "form: 'quadratic' has no": {"form": "quadratic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    names = ("q", "k", "v", "e", "a")
    good = {name: torch.zeros(2, 5, 2, 4 if name == "v" else 6) for name in names}
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        scan(**(good | BAD[message]))
    assert "\n" not in str(caught.value)


def test_bad_kind() -> None:
    with pytest.raises(ValueError, match="kind: needs one of"):
        scan_flops("softmax", 8, 1, 4, 4)
