"""The zoo's names: cards, registration, construction."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import walk_packages
from typing import Any, Literal

from attnzoo import options as opts
from attnzoo.attention.base import Mixer, Site
from attnzoo.attention.draft import Draft, Frame, OwnFrame, RecurrentFrame, ScoreFrame
from attnzoo.attention.own import AsIs

TRAITS = ("causal", "prefix_consistent", "row_independent", "decodes", "packs", "trains")
FRAMES: dict[str, type[Frame]] = {
    "score": ScoreFrame,
    "recurrent": RecurrentFrame,
    "own": OwnFrame,
}
Choose = Callable[..., str]  # choose(site, **options of the variant) -> frame


@dataclass(frozen=True)
class Card:
    """What there is to know about a variant.

    Args:
        name: registry name. title: in words. paper: title; arxiv: id. family: folder of the zoo.
        summary: one sentence. cached: what decoding stores.
        adapted: what of the paper looks ahead, and the causal form that stands here; empty: causal by nature.
        traits: properties that hold (all True unless the mathematics forbids it); see ``TRAITS``.
        claims: headline claims of the paper with their conditions.
        small: options under which the mechanism shows at some twenty tokens; the property suite uses them
            too.
        layers: how many layers show the mechanism, where it spans several; the property suite tests a stack.
        no_grad: parameters without gradient -> reason.
        defaults: every option with its default; filled in by `register`.
    """

    name: str
    title: str
    family: str
    summary: str
    paper: str = ""
    arxiv: str = ""
    cached: str = "keys and values"
    adapted: str = ""
    traits: Mapping[str, bool] = field(default_factory=dict)
    claims: tuple[str, ...] = ()
    small: Mapping[str, Any] = field(default_factory=dict)
    layers: int = 1
    no_grad: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A registered variant: its card, its change of a draft, and the frames the change fits (its own
    first, unless ``choose`` says which by layer and options).
    """

    card: Card
    change: Callable[..., None]
    frames: tuple[str, ...]
    host: Mapping[str, Any]
    fixed: Mapping[str, str]
    choose: Choose | None = None
    branches: tuple[str, ...] = ()

    def own_frames(self) -> tuple[str, ...]:
        """The frames that it can have when it is created by its name."""
        return self.frames if self.choose else self.frames[:1]


_entries: dict[str, Entry] = {}


def register(
    card: Card,
    *,
    frames: tuple[str, ...] = ("score",),
    host: Mapping[str, Any] | None = None,
    fixed: Mapping[str, str] | None = None,
    choose: Choose | None = None,
    branches: tuple[str, ...] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a variant: a function that edits a `Draft`, its keyword-only parameters being the options.

    Args:
        card: its description; ``defaults`` are read from the signature.
        frames: frames that the change fits: "score", "recurrent", "own"; the first is the variant's own.
        host: options of the frame that the variant presets, e.g. ``{"num_kv_heads": 1}``.
        fixed: options of the frame that make no sense here -> reason.
        choose: ``choose(site, **options)`` -> frame, for a variant whose layers or options differ in it.
        branches: frames of the mixers inside it, where variants that fit these may be added.

    Raises:
        ValueError: the name is taken, or a trait or option is unknown.
    """
    host, fixed = dict(host or {}), dict(fixed or {})
    for trait in card.traits:
        if trait not in TRAITS:
            raise opts.unknown("traits", trait, TRAITS, card.name)
    own = frames if choose else frames[:1]
    frame = {name: p for f in reversed(own) for name, p in _host_options(f).items()}
    for name in (*host, *fixed):
        if name not in frame:
            raise opts.unknown("option", name, frame, f"frame {' or '.join(own)}")

    def add(change: Callable[..., None]) -> Callable[..., None]:
        known = _entries.get(card.name)
        if known and known.change.__module__ != change.__module__:
            raise ValueError(
                f"register: {card.name!r} is registered by {known.change.__module__}; choose another name"
            )
        defaults = {
            n: p.default for n, p in (frame | opts.keyword_options(change)).items() if n not in fixed
        } | {n: v for n, v in host.items() if n not in fixed}
        full = replace(card, traits=dict.fromkeys(TRAITS, True) | dict(card.traits), defaults=defaults)
        _entries[card.name] = Entry(full, change, frames, host, fixed, choose, branches)
        return change

    return add


def create(name: str, dim: int, num_heads: int, **options: Any) -> Mixer:
    """Builds a mixer.

    Args:
        name: a registered variant, see `list_variants`.
        dim: width of the stream; num_heads: query heads.
        options: of the variant (``card(name).defaults``), and ``add``: variants whose change comes on top;
            their options are flat where unambiguous, else dotted (``{"moh.shared_heads": 2}``).

    Raises:
        ValueError: unknown name or option, a value out of its range, or a combination that makes no sense.
    """
    return build(name, dim, num_heads, options, {})


def build(name: str, dim: int, num_heads: int, options: Mapping[str, Any], bank: dict[str, Any]) -> Mixer:
    """`create`, for a layer of a model whose layers share the modules in ``bank``."""
    entry, options = _entry(name), dict(options)
    _check_size("dim", dim)
    _check_size("num_heads", num_heads)
    title, others, layers = _frames_of(entry, options, bank)
    frame = FRAMES[title]
    adds, later = _added(name, options.pop("add", ()), title, entry.branches, layers)
    chosen = _sort_options(name, entry, adds, options, title, others, later)
    host = chosen.pop("")
    site = _site(host, bank)
    draft = Draft(frame, site, dim, num_heads, host=host, current=name)
    frame.begin(draft, **{k: host[k] for k in opts.keyword_options(frame.begin)})
    for member in adds:
        if title not in member.frames:
            change = partial(member.change, **chosen[member.card.name])
            draft.within.append((member.card.name, member.frames, change))
    for member in (entry, *adds):
        if title in member.frames or member is entry:
            draft.current = member.card.name
            member.change(draft, **chosen[member.card.name])
    if draft.within:
        other, frames, _ = draft.within[0]
        raise ValueError(
            f"add: {other!r} changes {FRAMES[frames[0]].title}, no branch of {name!r} is one under these "
            "options; leave it out"
        )
    mixer = frame.finish(draft)
    mixer.name, mixer.dim, mixer.num_heads, mixer.site = name, dim, num_heads, draft.site
    mixer.gives, mixer.needs, mixer.objective = draft.gives, draft.needs, draft.objective
    mixer.single_residual = draft.single_residual
    mixer.options = (
        {"add": tuple(e.card.name for e in adds)}
        | host
        | {
            k if sum(k in c for c in chosen.values()) == 1 and k not in host else f"{member}.{k}": v
            for member, values in chosen.items()
            for k, v in values.items()
        }
    )
    return mixer


def branch(
    draft: Draft, frame: str, change: Callable[[Draft], None], num_heads: int | None = None, **host: Any
) -> Mixer:
    """A mixer inside a mixer, without output projection, for `attnzoo.attention.own.Parallel`.

    Args:
        draft: of the mixer around it. change: edits the branch's draft. num_heads: default the draft's.
        host: options of the branch's frame, whose defaults hold otherwise.
    """
    options = {k: p.default for k, p in _host_options(frame).items()}
    shared = {k: v for k, v in draft.host.items() if k in opts.keyword_options(_common)}
    options |= shared | host
    inner = Draft(
        FRAMES[frame],
        draft.site,
        draft.dim,
        num_heads or draft.num_heads,
        host=options,
        current=draft.current,
    )
    FRAMES[frame].begin(inner, **{k: options[k] for k in opts.keyword_options(FRAMES[frame].begin)})
    change(inner)
    for entry in [e for e in draft.within if frame in e[1]]:
        draft.within.remove(entry)
        inner.current = entry[0]
        entry[2](inner)
    inner.put("out", AsIs())
    mixer = FRAMES[frame].finish(inner)
    mixer.name, mixer.dim, mixer.num_heads = draft.current, draft.dim, inner.num_heads
    mixer.site, mixer.options = draft.site, options
    draft.gives |= inner.gives
    draft.needs |= inner.needs
    return mixer


def list_variants(pattern: str = "*", family: str | None = None) -> list[str]:
    """Registered names that match a glob, sorted; ``family`` filters."""
    _load()
    return sorted(
        n for n, e in _entries.items() if fnmatchcase(n, pattern) and family in (None, e.card.family)
    )


def card(name: str, add: str | Sequence[str] = ()) -> Card:
    """The card of a variant; with ``add``, of a composition, which has the traits that all members have."""
    entries = [_entry(n) for n in (name, *_names(add))]
    own, *others = every = [e.card for e in entries]
    if not others:
        return own
    fixed = {option for e in entries for option in e.fixed}
    return replace(
        own,
        defaults={k: v for k, v in own.defaults.items() if k not in fixed},
        traits={trait: all(c.traits[trait] for c in every) for trait in own.traits},
        no_grad={k: v for c in every for k, v in c.no_grad.items()},
        layers=max(c.layers for c in every),
    )


def equations(name: str) -> str:
    """Idea, source and equations of a variant: the docstring its file opens with."""
    return (sys.modules[_entry(name).change.__module__].__doc__ or "").strip()


def legal_options(name: str, add: tuple[str, ...] = ()) -> set[str]:
    """Names of the options that `create` takes for ``name``."""
    entries = [_entry(n) for n in (name, *add)]
    frames = entries[0].own_frames()
    host = {o for f in frames for o in _host_options(f)} - entries[0].fixed.keys()
    own = {o for e in entries for o in opts.keyword_options(e.change)}
    return {"add", *host, *entries[0].card.defaults, *own}


def _common(
    *,
    impl: Literal["auto", "reference", "sdpa", "flex", "triton", "xformers"] = "auto",
    layer_idx: int = 0,
    num_layers: int = 1,
    max_seq_len: int = 2048,
) -> None:
    """Options of every mixer; only their signature is used."""


def _frames_of(
    entry: Entry, options: Mapping[str, Any], bank: dict[str, Any]
) -> tuple[str, set[str], set[str]]:
    """The frame of a variant at its layer, under its own options; those that layers can have; those that the
    layers of its model have.
    """
    if entry.choose is None:
        return entry.frames[0], set(entry.frames[:1]), set(entry.frames[:1])
    place = {
        k: opts.check(k, options.get(k, p.default), p.annotation)
        for k, p in opts.keyword_options(_common).items()
    }
    own = {
        k: opts.check(k, options.get(k, p.default), p.annotation)
        for k, p in opts.keyword_options(entry.change).items()
    }
    site = _site(place, bank)
    # the first also where one layer stands alone, for those that it stands for
    some, real = (
        {entry.choose(site._replace(layer=i), **own) for i in range(depth)}
        for depth in (max(site.depth, 16), site.depth)
    )
    return entry.choose(site, **own), some, real


def _site(options: Mapping[str, Any], bank: dict[str, Any]) -> Site:
    layer, depth, longest = (options[name] for name in ("layer_idx", "num_layers", "max_seq_len"))
    _check_size("num_layers", depth)
    _check_size("max_seq_len", longest)
    if not 0 <= layer < depth:
        raise ValueError(
            f"layer_idx: must be in 0..num_layers-1={depth - 1}, got {layer}; set num_layers as well"
        )
    return Site(layer, depth, longest, bank=bank)


@cache
def _host_options(frame: str) -> dict[str, Any]:
    return opts.keyword_options(FRAMES[frame].begin) | opts.keyword_options(_common)


def _check_size(field: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field}: must be an integer of at least 1, got {value!r}")


def _names(add: Any) -> list[str]:
    """The option ``add`` as a list."""
    return [add] if isinstance(add, str) else list(add or ())


def _added(
    name: str, add: Any, frame: str, branches: tuple[str, ...], layers: set[str]
) -> tuple[list[Entry], list[Entry]]:
    """The entries of ``add``, whose changes the frame or a branch must have a place for, and those that have
    it in other layers of the model only, to which they are left.
    """
    names = _names(add)
    entries, later = [], []
    for other in names:
        entry = _entry(other)
        if other == name or names.count(other) > 1:
            raise ValueError(f"add: {other!r} is already part of the composition; name it once")
        if not {frame, *branches} & {*entry.frames}:
            if layers & {*entry.frames}:
                later.append(entry)
                continue
            raise ValueError(
                f"add: {other!r} changes {FRAMES[entry.frames[0]].title}, {name!r} is {FRAMES[frame].title}: "
                f"{FRAMES[frame].lacks}; leave it out"
            )
        entries.append(entry)
    return entries, later


def _sort_options(
    name: str,
    entry: Entry,
    adds: list[Entry],
    options: Mapping[str, Any],
    frame: str,
    others: set[str],
    later: list[Entry],
) -> dict[str, dict[str, Any]]:
    """Checked options per member of the composition, defaults filled in; the frame's under ``""``.

    Options of the frames ``others``, which the variant has in other layers, and of the variants ``later``,
    which are added there, are left to those.
    """
    members = {e.card.name: opts.keyword_options(e.change) for e in (entry, *adds)}
    tables = {"": _host_options(frame), **members}
    here, defaults = set().union(*tables.values()), entry.card.defaults
    elsewhere = {o for f in others for o in _host_options(f)}
    elsewhere |= {o for e in later for o in opts.keyword_options(e.change)}
    elsewhere -= here
    # the defaults of a frame that these options rule out say nothing
    elsewhere |= {
        o for o, value in options.items() if o not in here and o in defaults and value == defaults[o]
    }
    away = {e.card.name for e in later}
    options = {k: v for k, v in options.items() if k not in elsewhere and k.split(".")[0] not in away}
    chosen = {member: {k: p.default for k, p in table.items()} for member, table in tables.items()}
    set_by: dict[str, str] = {}
    for e in (entry, *adds):
        for option, value in e.host.items():
            if option not in tables[""]:
                continue
            against = next((o for o in (entry, *adds) if option in o.fixed and o is not e), None)
            before = chosen[""][option] if option in set_by else value
            if option in options and (against or before != value):
                continue  # the caller decides
            if against:
                raise ValueError(
                    f"{option}: {against.fixed[option]}, got {value!r} by {e.card.name}; "
                    f"leave {e.card.name} or {against.card.name} out"
                )
            if before != value:
                raise ValueError(
                    f"add: {set_by[option]} presets {option}={before!r}, {e.card.name} {value!r}; "
                    f"set {option}, or leave one of them out"
                )
            chosen[""][option], set_by[option] = value, e.card.name
    for key, value in opts.flatten(options, members).items():
        if key in FRAMES[frame].absent and not any(key in table for table in tables.values()):
            raise ValueError(f"{key}: {FRAMES[frame].absent[key]}, got {value!r}; leave it out")
        owner, option = _owner(key, name, tables)
        if owner == "":
            for e in (entry, *adds):
                if option in e.fixed and value != chosen[""][option]:
                    raise ValueError(f"{option}: {e.fixed[option]}, got {value!r}; leave it out")
        chosen[owner][option] = opts.check(key, value, tables[owner][option].annotation)
    return chosen


def _owner(key: str, name: str, tables: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    prefix, _, option = key.rpartition(".")
    if prefix:
        if prefix not in tables or option not in tables[prefix]:
            raise opts.unknown("option", key, [f"{m}.{o}" for m, t in tables.items() if m for o in t], name)
        return prefix, option
    owners = [member for member, table in tables.items() if key in table]
    if not owners:
        raise opts.unknown("option", key, {"add"}.union(*tables.values()), name)
    if len(owners) > 1:
        raise ValueError(f"{key}: {' and '.join(owners)} both have it; write {owners[-1]}.{key}")
    return owners[0], key


def _entry(name: str) -> Entry:
    _load()
    if name not in _entries:
        raise opts.unknown("variant", str(name), _entries, "the zoo")
    return _entries[name]


@cache
def _load() -> None:
    """Imports the zoo, and variants that other packages announce under ``attnzoo.variants``."""
    package = import_module("attnzoo.attention")
    for module in walk_packages(package.__path__, "attnzoo.attention."):
        import_module(module.name)
    for point in entry_points(group="attnzoo.variants"):
        point.load()
