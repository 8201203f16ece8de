"""Options of variants: read from signatures, checked before anything is built."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal


def keyword_options(function: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of ``function`` that have a default."""
    hints = typing.get_type_hints(function)
    return {
        name: p.replace(annotation=hints.get(name, Any))
        for name, p in inspect.signature(function).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }


def check(name: str, value: Any, annotation: Any) -> Any:
    """``value`` if it is of the annotated type, sequences as tuples, whole floats as ints.

    Raises:
        ValueError: naming the option, the rule and the value.
    """
    if annotation is Any:
        return value
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _check_union(name, value, args)
    if origin is Literal:
        if value not in args or isinstance(value, bool) != any(isinstance(a, bool) for a in args):
            raise ValueError(
                f"{name}: must be one of {', '.join(map(repr, args))}, got {value!r}{_near(value, args)}"
            )
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"{name}: must be a list, got {value!r}")
        return tuple(check(f"{name}[{i}]", v, args[0]) for i, v in enumerate(value))
    fits = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, (int, float)) and not isinstance(value, bool),
        str: isinstance(value, str),
    }
    if not fits.get(annotation, True):
        raise ValueError(f"{name}: must be {_title(annotation)}, got {value!r}")
    return float(value) if annotation is float else value


def _check_union(name: str, value: Any, args: tuple) -> Any:
    if value is None and type(None) in args:
        return None
    rest = [a for a in args if a is not type(None)]
    for annotation in rest:
        try:
            return check(name, value, annotation)
        except ValueError as error:
            last = error
    if len(rest) == 1:
        raise last
    raise ValueError(f"{name}: must be {' or '.join(_title(a) for a in args)}, got {value!r}")


def _title(annotation: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "null"}
    if typing.get_origin(annotation) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(annotation)))}"
    return "a list" if typing.get_origin(annotation) is tuple else names.get(annotation, str(annotation))


def _near(value: Any, choices: Iterable[Any]) -> str:
    match = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def unknown(kind: str, name: str, choices: Iterable[str], owner: str = "") -> ValueError:
    """The error for a name that is not among ``choices``, with the nearest."""
    choices = sorted(choices)
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    of = f" of {owner}" if owner else ""
    return ValueError(f"{kind}: {name!r} is none{of}; {hint}legal: {', '.join(choices)}")


def flatten(options: Mapping[str, Any], groups: Iterable[str]) -> dict[str, Any]:
    """Nested options of added variants (``{"moh": {"rank": 2}}``) as dotted ones (``{"moh.rank": 2}``)."""
    groups, flat = set(groups), {}
    for name, value in options.items():
        if name in groups and isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": v for inner, v in value.items()}
        else:
            flat[name] = value
    return flat
