"""From a recipe to a mixer: the draft that variants edit, and what a frame is that completes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attnzoo.attention.base import Mixer, Stage
from attnzoo.attention.site import Site
from attnzoo.objective import BlockDiffusion

CHAINS = ("refine", "combine", "after")


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
        raise ValueError(f"num_kv_heads: must be in 1..num_heads={H}, got {G}; choose one of {divisors(H)}")
    if head_dim is None and D % H:
        raise ValueError(
            f"dim: must be divisible by num_heads={H}, got {D}; change one of them or set head_dim"
        )
    draft.num_kv_heads, draft.head_dim = G, D // H if head_dim is None else head_dim
    if draft.head_dim < 1:
        raise ValueError(f"head_dim: must be at least 1, got {draft.head_dim}")
    draft.v_head_dim, draft.o_heads = draft.head_dim, H


def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
