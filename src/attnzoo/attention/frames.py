"""The frames that complete a draft: scores over keys, a recurrent state, another architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from attnzoo.attention.base import Mixer
from attnzoo.attention.draft import Draft, Frame, divisors, set_heads
from attnzoo.attention.implementation import choose_scan, choose_score
from attnzoo.attention.own import OwnAttention
from attnzoo.attention.recurrent import NoGates, RecurrentAttention, Scan
from attnzoo.attention.score import ScoreAttention, Single
from attnzoo.attention.stages.combine import Gate
from attnzoo.attention.stages.mask import Static, band
from attnzoo.attention.stages.out import LinearOut
from attnzoo.attention.stages.position import NoPosition, Rope
from attnzoo.attention.stages.project import QKV
from attnzoo.attention.stages.refine import QKNorm


def check_groups(draft: Draft) -> None:
    """Query heads share key heads in groups of one size, unless the projection says which reads which."""
    project, H, G = draft.slots["project"], draft.score_heads or draft.num_heads, draft.num_kv_heads
    mapped = hasattr(project, "maps") and project.maps()[0] is not None
    if H % G and not mapped:
        raise ValueError(f"num_kv_heads: must divide num_heads={H}, got {G}; choose one of {divisors(H)}")


def check_widths(draft: Draft) -> None:
    """Whether heads are still as wide as the projection of a variant makes them."""
    now = (draft.head_dim, draft.rotary, draft.v_head_dim)
    if draft.built not in (None, now):
        raise ValueError(
            f"add: {draft.owner['project']} makes heads of {draft.built} channels (content, rotary, value), "
            f"another variant of the composition wants {now}; leave one of them out"
        )


def check_tails(draft: Draft) -> None:
    """A late projection makes all keys anew at every read, so none are left from the tokens before."""
    project = draft.slots["project"]
    for stage in draft.slots["refine"] if project.late else ():
        if set(stage.sides) & set("kv") and any(s.kind == "tail" for s in stage.memory().values()):
            raise ValueError(
                f"add: {type(stage).__name__} mixes keys with those of the tokens before, which a latent "
                "projection does not have before its cache; leave one of them out"
            )


class ScoreFrame(Frame):
    """`ScoreAttention`: softmax over dot products, RoPE, a causal mask, unless a variant says otherwise."""

    title = "ScoreAttention"
    absent: Mapping[str, str] = {"chunk_size": "queries meet their keys at once, without chunks of a state"}
    lacks = "it keeps keys, not a state that a recurrence could change"
    slots = (
        "project", "refine", "position", "score", "mask", "normalise", "read", "combine", "out", "after"
    )  # fmt: skip

    @staticmethod
    def begin(
        draft: Draft,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        pos: Literal["rope", "none"] = "rope",
        rope_theta: float = 10000.0,
        qk_norm: bool = False,
        window: int | None = None,
        n_sink: int = 0,
        output_gate: Literal["none", "headwise", "elementwise"] = "none",
        qkv_bias: bool = False,
        out_bias: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        set_heads(draft, num_kv_heads, head_dim)

    @staticmethod
    def finish(draft: Draft) -> Mixer:
        draft.settle()
        host, site, H = draft.host, draft.site, draft.num_heads
        rotary = draft.rotary or draft.head_dim
        field_name = "qk_rope_head_dim" if draft.rotary else "head_dim"
        rope = host["pos"] == "rope"
        draft.fill("position", lambda: Rope(rotary, host["rope_theta"], field_name) if rope else NoPosition())
        project = draft.fill(
            "project",
            lambda: QKV(
                site,
                draft.dim,
                H,
                draft.num_kv_heads,
                draft.head_dim,
                draft.v_head_dim,
                host["qkv_bias"],
                num_v_heads=draft.shapes()["v"][0],
            ),
        )
        check_groups(draft)
        check_widths(draft)
        check_tails(draft)
        project.lends = draft.lends
        if host["qk_norm"]:
            sides = "q" if draft.borrows else "qk"
            draft.slots["refine"].append(QKNorm(draft.head_dim, host["norm_eps"], sides))
        add_gate(draft)
        slots = draft.slots
        draft.fill("mask", lambda: Static(band(host["window"], host["n_sink"])))
        draft.fill("read", Single)
        draft.fill(
            "out", lambda: LinearOut(site, draft.o_heads, draft.v_head_dim, draft.dim, host["out_bias"])
        )
        mixer = ScoreAttention(
            project=project,
            refine=slots["refine"],
            position=slots["position"],
            score=slots.get("score"),
            mask=slots["mask"],
            normalise=slots.get("normalise"),
            read=slots["read"],
            combine=slots["combine"],
            out=slots["out"],
            after=slots["after"],
            scale=draft.scale or draft.qk_width**-0.5,
            sizes=(draft.score_heads or H, draft.qk_width, draft.v_head_dim),
        )
        own = {name: slots[name] for name in ("score", "normalise") if name in slots}
        own |= {} if getattr(slots["read"], "plain", True) else {"read": slots["read"]}
        between = [type(stage).__name__ for stage in (*slots["refine"], *own.values())]
        mixer.choices = choose_score(host["impl"], own, slots["mask"], project.late, between)
        return mixer


class RecurrentFrame(Frame):
    """`RecurrentAttention` without gates, positions or output stages unless a variant says otherwise."""

    title = "RecurrentAttention"
    lacks = "it reads a state, in which no key has a score or a weight of its own"
    slots = ("project", "refine", "position", "gates", "scan", "combine", "out", "after")
    absent: Mapping[str, str] = {
        "window": "a state is a sum over the past from which no single key can be taken out again",
        "n_sink": "a state is a sum over the past, without a window that sinks could extend",
    }

    @staticmethod
    def begin(
        draft: Draft,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        pos: Literal["rope", "none"] = "none",
        rope_theta: float = 10000.0,
        qk_norm: bool = False,
        chunk_size: int = 64,
        output_gate: Literal["none", "headwise", "elementwise"] = "none",
        qkv_bias: bool = False,
        out_bias: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        set_heads(draft, num_kv_heads, head_dim)

    @staticmethod
    def finish(draft: Draft) -> Mixer:
        draft.settle()
        host, site, H, slots = draft.host, draft.site, draft.o_heads, draft.slots
        draft.fill(
            "position",
            lambda: Rope(draft.head_dim, host["rope_theta"]) if host["pos"] == "rope" else NoPosition(),
        )
        draft.fill(
            "project",
            lambda: QKV(
                site,
                draft.dim,
                draft.num_heads,
                draft.num_kv_heads,
                draft.project_width or draft.head_dim,
                draft.v_head_dim,
                host["qkv_bias"],
                stores=False,
                num_v_heads=draft.shapes()["v"][0],
            ),
        )
        check_groups(draft)
        if host["qk_norm"]:
            draft.slots["refine"].append(QKNorm(draft.project_width or draft.head_dim, host["norm_eps"]))
        add_gate(draft)
        gates = draft.fill("gates", NoGates)
        scale = draft.head_dim**-0.5 if draft.scale is None else draft.scale
        shared = gates.kind in ("scalar", "delta") and draft.num_kv_heads == draft.num_heads < H
        sizes = (H, draft.head_dim, draft.v_head_dim, host["chunk_size"], scale, gates.kind)
        draft.fill("scan", lambda: Scan(*sizes, draft.num_heads if shared else None))
        draft.fill("out", lambda: LinearOut(site, H, draft.v_head_dim, draft.dim, host["out_bias"]))
        mixer = RecurrentAttention(**{name: slots[name] for name in RecurrentFrame.slots})
        own = getattr(slots["scan"], "choose", None)
        mixer.choices = own(host["impl"]) if own else choose_scan(host["impl"], draft.head_dim)
        return mixer


class OwnFrame(Frame):
    """`OwnAttention`: another architecture as one stage ``core``; the rest as in the other frames."""

    title = "OwnAttention"
    lacks = "it is another architecture, which does not have the step that would change"
    absent: Mapping[str, str] = {
        "num_kv_heads": "this architecture has no query heads that could share keys",
        "window": "this architecture sets by its own options how far it looks back",
        "n_sink": "this architecture sets by its own options how far it looks back",
        "qk_norm": "this architecture has no heads of queries and keys",
        "qkv_bias": "this architecture's projections are of other things, with biases where it has them",
        "pos": "positions enter by this architecture's own options, or not at all",
        "rope_theta": "positions enter by this architecture's own options, or not at all",
        "head_dim": "this architecture sets its widths by its own options",
        "chunk_size": "this architecture sets by its own options how it is computed",
    }
    slots = ("core", "combine", "out", "after")

    @staticmethod
    def begin(
        draft: Draft,
        *,
        output_gate: Literal["none", "headwise", "elementwise"] = "none",
        out_bias: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        set_heads(draft, None, None)

    @staticmethod
    def finish(draft: Draft) -> Mixer:
        draft.settle()
        host, slots = draft.host, draft.slots
        add_gate(draft)
        draft.fill(
            "out",
            lambda: LinearOut(draft.site, draft.o_heads, draft.v_head_dim, draft.dim, host["out_bias"]),
        )
        mixer = OwnAttention(**{name: slots[name] for name in OwnFrame.slots})
        mixer.choices = slots["core"].choose(host["impl"])
        return mixer


def add_gate(draft: Draft) -> None:
    """The ``output_gate`` option (arXiv 2505.06708): a sigmoid of x on each head or channel."""
    kind = draft.host["output_gate"]
    if kind == "none":
        return
    gate = Gate(draft.site, draft.dim, draft.o_heads, draft.v_head_dim, torch.sigmoid, kind == "elementwise")
    draft.slots["combine"].append(gate)
