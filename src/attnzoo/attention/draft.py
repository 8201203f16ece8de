"""From a recipe to a mixer: the draft that variants edit, and the two frames that complete it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from attnzoo.attention.base import Mixer, Site, Stage
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
from attnzoo.objective import BlockDiffusion

CHAINS = ("refine", "combine", "after")
IMPLS = ("auto", "reference", "sdpa", "flex", "triton", "xformers")


@dataclass
class Draft:
    """A mixer in the making. A variant puts the stages it changes; the frame fills the rest.

    Attributes:
        site, dim, num_heads, num_kv_heads: H query heads, G key/value heads.
        num_v_heads: value heads where there are not G of them (0 = as many as come out, at least G).
        score_heads: heads that have scores, where there are not H of them (0 = H).
        head_dim: width of the content part of a q/k head; v_head_dim: of a v head; rotary: extra rotary
            width.
        scale: score scale (default 1/sqrt of the q/k width); host: the frame's options.
        o_heads: heads that reach the output projection (value heads where they outnumber the query heads).
        project_width: q/k width out of the projection where a feature map changes it (0 = head_dim).
        qk_width: width of a whole q/k head.
        hooks: what variants do once all of them have spoken: stages that need the final shapes, checks.
        gives, needs, objective, single_residual: see `Mixer`.
        borrows: keys and values are another layer's; refine stages change queries only.
        within: added variants (name, frames, change) that fit a branch of this mixer, not its own frame.
        lends: the name under which later layers find this layer's keys ("" = they do not).
        built: the widths of heads when a variant put its projection.
    """

    frame: type[Frame]
    site: Site
    dim: int
    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    v_head_dim: int = 0
    rotary: int = 0
    scale: float | None = None
    host: dict[str, Any] = field(default_factory=dict)
    slots: dict[str, Any] = field(default_factory=lambda: {name: [] for name in CHAINS})
    owner: dict[str, str] = field(default_factory=dict)
    current: str = ""
    hooks: list[tuple[str, Callable[[Draft], None]]] = field(default_factory=list)
    o_heads: int = 0
    project_width: int = 0
    num_v_heads: int = 0
    score_heads: int = 0
    gives: dict[str, object] = field(default_factory=dict)
    needs: dict[str, object] = field(default_factory=dict)
    borrows: bool = False
    within: list[tuple[str, tuple[str, ...], Callable[[Draft], None]]] = field(default_factory=list)
    objective: BlockDiffusion | None = None
    single_residual: bool = False
    lends: str = ""
    built: tuple[int, int, int] | None = None

    @property
    def qk_width(self) -> int:
        return self.head_dim + self.rotary

    def shapes(self, projected: bool = False) -> dict[str, tuple[int, int]]:
        """(heads, width) of q, k and v as refine stages see them: feature maps and what comes after them, or,
        ``projected``, what comes before.
        """
        width = (projected and self.project_width) or self.head_dim
        more = self.o_heads > self.num_heads
        v_heads = self.num_v_heads or (max(self.num_kv_heads, self.o_heads) if more else self.num_kv_heads)
        return {
            "q": (self.num_heads, width),
            "k": (self.num_kv_heads, width),
            "v": (v_heads, self.v_head_dim),
        }

    def last(self, hook: Callable[[Draft], None]) -> None:
        """Runs ``hook`` after all variants of the composition."""
        self.hooks.append((self.current, hook))

    def before_others(self, hook: Callable[[Draft], None]) -> None:
        """Runs ``hook`` before the hooks of `last`: for widths that those build stages for."""
        self.hooks.insert(0, (self.current, hook))

    def very_last(self, hook: Callable[[Draft], None]) -> None:
        """Runs ``hook`` after every hook of `last`: for what those may still change."""
        self.last(lambda done: done.last(hook))

    def check_unbuilt(self) -> None:
        """Whether head counts may still change.

        Raises:
            ValueError: another variant of the composition already built a stage for them.
        """
        counted = ("project", "refine", "gates", "scan", "score", "combine", "out")
        built = [slot for slot in counted if self.slots.get(slot)]
        if built:
            raise ValueError(
                f"add: {' and '.join(built)} are built for other head counts than those of {self.current}; "
                "leave one of the variants out"
            )

    def settle(self) -> None:
        """Runs the hooks, each in its variant's name."""
        for name, hook in self.hooks:
            self.current = name
            hook(self)

    def put(self, slot: str, stage: Stage) -> None:
        """Sets a slot, or extends a chain (refine, combine).

        Raises:
            ValueError: another variant of the composition already set the slot, or the frame has no such
                slot.
        """
        if slot not in self.frame.slots:
            raise ValueError(
                f"add: {self.current} sets {slot!r}, which {self.frame.title} does not have; leave it out"
            )
        if slot in CHAINS:
            self.slots[slot].append(stage)
            return
        if slot in self.owner:
            raise ValueError(
                f"add: {self.owner[slot]} and {self.current} both set {slot!r}; leave one of them out"
            )
        self.slots[slot], self.owner[slot] = stage, self.current
        if slot == "project":
            self.built = (self.head_dim, self.rotary, self.v_head_dim)

    def fill(self, slot: str, make: Callable[[], Stage]) -> Stage:
        """The slot's stage, made now if no variant put one."""
        if slot not in self.slots:
            self.slots[slot] = make()
        return self.slots[slot]

    def linear(self, name: str, d_in: int, d_out: int, bias: bool = False) -> torch.nn.Linear:
        return self.site.weights.linear(name, d_in, d_out, bias)


class Frame:
    """A skeleton's options and defaults."""

    title: str
    slots: tuple[str, ...]
    absent: Mapping[str, str] = {}  # options of other frames -> why they make no sense in this one
    lacks: str  # why changes of other frames have no place in it

    @staticmethod
    def begin(draft: Draft) -> None:
        """Checks the options that all variants of the frame share and sets the draft's widths."""
        raise NotImplementedError

    @staticmethod
    def finish(draft: Draft) -> Mixer:
        """Fills the slots no variant set and builds the mixer."""
        raise NotImplementedError


def set_heads(draft: Draft, num_kv_heads: int | None, head_dim: int | None) -> None:
    """Head counts and widths from the options; `check_groups` looks at the counts that variants leave."""
    H, D = draft.num_heads, draft.dim
    G = H if num_kv_heads is None else num_kv_heads
    if G < 1 or G > H:
        raise ValueError(f"num_kv_heads: must be in 1..num_heads={H}, got {G}; choose one of {_divisors(H)}")
    if head_dim is None and D % H:
        raise ValueError(
            f"dim: must be divisible by num_heads={H}, got {D}; change one of them or set head_dim"
        )
    draft.num_kv_heads, draft.head_dim = G, D // H if head_dim is None else head_dim
    if draft.head_dim < 1:
        raise ValueError(f"head_dim: must be at least 1, got {draft.head_dim}")
    draft.v_head_dim, draft.o_heads = draft.head_dim, H


def check_groups(draft: Draft) -> None:
    """Query heads share key heads in groups of one size, unless the projection says which reads which."""
    project, H, G = draft.slots["project"], draft.score_heads or draft.num_heads, draft.num_kv_heads
    mapped = hasattr(project, "maps") and project.maps()[0] is not None
    if H % G and not mapped:
        raise ValueError(f"num_kv_heads: must divide num_heads={H}, got {G}; choose one of {_divisors(H)}")


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


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
