"""From names and options to the members of a composition: which frame, which options, what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

from attnzoo import options as opts
from attnzoo.attention.draft import Frame
from attnzoo.attention.frames import OwnFrame, RecurrentFrame, ScoreFrame
from attnzoo.attention.site import Site
from attnzoo.cards import Entry

FRAMES: dict[str, type[Frame]] = {
    "score": ScoreFrame,
    "recurrent": RecurrentFrame,
    "own": OwnFrame,
}


def common(
    *,
    impl: Literal["auto", "reference", "sdpa", "flex", "triton", "xformers"] = "auto",
    layer_idx: int = 0,
    num_layers: int = 1,
    max_seq_len: int = 2048,
) -> None:
    """Options of every mixer; only their signature is used."""


def frames_of(
    entry: Entry, options: Mapping[str, Any], bank: dict[str, Any]
) -> tuple[str, set[str], set[str]]:
    """The frame of a variant at its layer, under its own options; those that layers can have; those that the
    layers of its model have.
    """
    if entry.choose is None:
        return entry.frames[0], set(entry.frames[:1]), set(entry.frames[:1])
    place = {
        k: opts.check(k, options.get(k, p.default), p.annotation)
        for k, p in opts.keyword_options(common).items()
    }
    own = {
        k: opts.check(k, options.get(k, p.default), p.annotation)
        for k, p in opts.keyword_options(entry.change).items()
    }
    site = site_of(place, bank)
    # the first also where one layer stands alone, for those that it stands for
    some, real = (
        {entry.choose(replace(site, layer=i), **own) for i in range(depth)}
        for depth in (max(site.depth, 16), site.depth)
    )
    return entry.choose(site, **own), some, real


def site_of(options: Mapping[str, Any], bank: dict[str, Any]) -> Site:
    layer, depth, longest = (options[name] for name in ("layer_idx", "num_layers", "max_seq_len"))
    check_size("num_layers", depth)
    check_size("max_seq_len", longest)
    if not 0 <= layer < depth:
        raise ValueError(
            f"layer_idx: must be in 0..num_layers-1={depth - 1}, got {layer}; set num_layers as well"
        )
    return Site(layer, depth, longest, bank=bank)


@cache
def host_options(frame: str) -> dict[str, Any]:
    return opts.keyword_options(FRAMES[frame].begin) | opts.keyword_options(common)


def check_size(field: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field}: must be an integer of at least 1, got {value!r}")


def names_of(add: Any) -> list[str]:
    """The option ``add`` as a list."""
    return [add] if isinstance(add, str) else list(add or ())


def added(
    host: Entry, others: Sequence[Entry], frame: str, layers: set[str]
) -> tuple[list[Entry], list[Entry]]:
    """The variants that are added to ``host``, whose changes its frame or a branch must have a place for, and
    those that have it in other layers of the model only, to which they are left.
    """
    entries, later = [], []
    for entry in others:
        if entry is host or others.count(entry) > 1:
            raise ValueError(f"add: {entry.card.name!r} is already part of the composition; name it once")
        if not {frame, *host.branches} & {*entry.frames}:
            if layers & {*entry.frames}:
                later.append(entry)
                continue
            raise ValueError(
                f"add: {entry.card.name!r} changes {FRAMES[entry.frames[0]].title}, {host.card.name!r} is "
                f"{FRAMES[frame].title}: {FRAMES[frame].lacks}; leave it out"
            )
        entries.append(entry)
    return entries, later


def sort_options(
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
    tables = {"": host_options(frame), **members}
    here, defaults = set().union(*tables.values()), entry.card.defaults
    elsewhere = {o for f in others for o in host_options(f)}
    elsewhere |= {o for e in later for o in opts.keyword_options(e.change)}
    elsewhere -= here
    # the defaults of a frame that these options rule out say nothing
    elsewhere |= {
        o for o, value in options.items() if o not in here and o in defaults and value == defaults[o]
    }
    away = {e.card.name for e in later}
    options = {k: v for k, v in options.items() if k not in elsewhere and k.split(".")[0] not in away}
    chosen = {member: {k: p.default for k, p in table.items()} for member, table in tables.items()}
    chosen[""] |= _presets((entry, *adds), tables[""], options)
    for key, value in opts.flatten(options, members).items():
        if key in FRAMES[frame].absent and not any(key in table for table in tables.values()):
            raise ValueError(f"{key}: {FRAMES[frame].absent[key]}, got {value!r}; leave it out")
        owner, option = _owner(key, entry.card.name, tables)
        if owner == "":
            for e in (entry, *adds):
                if option in e.fixed and value != chosen[""][option]:
                    raise ValueError(f"{option}: {e.fixed[option]}, got {value!r}; leave it out")
        chosen[owner][option] = opts.check(key, value, tables[owner][option].annotation)
    return chosen


def _presets(
    members: Sequence[Entry], table: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What the members of a composition preset of the frame's options, where the caller does not decide."""
    chosen: dict[str, Any] = {}
    set_by: dict[str, str] = {}
    for e in members:
        for option, value in e.host.items():
            if option not in table:
                continue
            against = next((o for o in members if option in o.fixed and o is not e), None)
            before = chosen[option] if option in set_by else value
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
            chosen[option], set_by[option] = value, e.card.name
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
