"""The zoo's names: cards, registration, construction."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache, partial
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import walk_packages
from typing import Any

from attnzoo import options as opts
from attnzoo.attention.base import Mixer
from attnzoo.attention.draft import Draft
from attnzoo.attention.own import AsIs
from attnzoo.cards import TRAITS, Card, Choose, Entry
from attnzoo.composition import (
    FRAMES,
    added,
    check_size,
    common,
    frames_of,
    host_options,
    names_of,
    site_of,
    sort_options,
)

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
    frame = {name: p for f in reversed(own) for name, p in host_options(f).items()}
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
    check_size("dim", dim)
    check_size("num_heads", num_heads)
    title, others, layers = frames_of(entry, options, bank)
    frame = FRAMES[title]
    named = [_entry(other) for other in names_of(options.pop("add", ()))]
    adds, later = added(entry, named, title, layers)
    chosen = sort_options(entry, adds, options, title, others, later)
    host = chosen.pop("")
    site = site_of(host, bank)
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
    options = {k: p.default for k, p in host_options(frame).items()}
    shared = {k: v for k, v in draft.host.items() if k in opts.keyword_options(common)}
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
    entries = [_entry(n) for n in (name, *names_of(add))]
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


def lacking(mixer: Mixer, trait: str) -> list[str]:
    """The registered variants in a mixer, its own and those added to it, that lack a trait; sorted."""
    names = {mixer.name, *mixer.options.get("add", ())} & set(list_variants())
    return sorted(name for name in names if not card(name).traits[trait])


def equations(name: str) -> str:
    """Idea, source and equations of a variant: the docstring its file opens with."""
    return (sys.modules[_entry(name).change.__module__].__doc__ or "").strip()


def legal_options(name: str, add: tuple[str, ...] = ()) -> set[str]:
    """Names of the options that `create` takes for ``name``."""
    entries = [_entry(n) for n in (name, *add)]
    frames = entries[0].own_frames()
    host = {o for f in frames for o in host_options(f)} - entries[0].fixed.keys()
    own = {o for e in entries for o in opts.keyword_options(e.change)}
    return {"add", *host, *entries[0].card.defaults, *own}


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
