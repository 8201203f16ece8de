"""What a configuration may build.

A run folder, a sweep or a checkpoint from elsewhere is data: it can ask for classes of attnzoo, torch and
lightning that are callbacks or loggers, and for nothing else. Only the user's own command line
(``allow_targets=[package.module]``) or environment (ATTNZOO_ALLOW_TARGETS) adds to that.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

PACKAGES = ("attnzoo", "torch", "lightning", "pytorch_lightning")
VARIABLE = "ATTNZOO_ALLOW_TARGETS"

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def allowed_targets(given: Any = ()) -> tuple[str, ...]:
    """The packages and modules that the user adds: those given, and those of ATTNZOO_ALLOW_TARGETS.

    Raises:
        ValueError: one is not a dotted name.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"allow_targets: must be a list of packages and modules, got {given!r}")
    names = [*given, *filter(None, os.environ.get(VARIABLE, "").split(","))]
    for name in names:
        if not isinstance(name, str) or not _DOTTED.fullmatch(name):
            raise ValueError(f"allow_targets: must be names such as my_package.callbacks, got {name!r}")
    return tuple(names)


def allow_here(names: Iterable[str]) -> None:
    """Let this process and those that it starts build from these packages, too."""
    allowed = allowed_targets(names)
    if allowed:
        os.environ[VARIABLE] = ",".join(dict.fromkeys(allowed))


def build(node: Any, kind: type, field: str, allow: tuple[str, ...] = ()) -> Any:
    """The object that a node of a configuration describes, without running anything else.

    Args:
        node: ``{"_target_": "package.module.Class", **arguments}``.
        kind: the base class that its group needs.
        field: the node's name, for the message.
        allow: packages and modules beside `PACKAGES`, by `allowed_targets`.

    Raises:
        ValueError: the target is outside of them, no class of that kind, or refuses its arguments.
    """
    found = check(node, kind, field, allow)
    try:
        return found(**{key: _made(value, f"{field}.{key}", allow) for key, value in _arguments(node)})
    except TypeError as error:
        raise ValueError(f"{field}: {found.__name__} does not take these arguments: {error}") from error


def check(
    node: Any, kind: type, field: str, allow: tuple[str, ...] = (), packages: tuple[str, ...] = PACKAGES
) -> type:
    """The class of a node, whose targets are all allowed; nothing is built.

    Args:
        packages: whose classes the node itself may name, beside ``allow``; those inside of its arguments
            are of ``allow`` only, because some of torch's read pickles.

    Raises:
        ValueError: as `build`.
    """
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise ValueError(f"{field}: must name a class as _target_, got {node!r}; or set it to null")
    found = resolve(node["_target_"], (*packages, *allow), f"{field}._target_")
    if not issubclass(found, kind):
        raise ValueError(f"{field}._target_: must be a {kind.__name__}, got {node['_target_']!r}")
    for key, value in _arguments(node):
        if str(key).startswith("_"):
            raise ValueError(f"{field}.{key}: arguments have no underscore in front, got {value!r}")
        check_inside(value, f"{field}.{key}", allow)
    return found


def check_inside(value: Any, field: str, allow: tuple[str, ...]) -> None:
    """Raise a ValueError if a value holds, at any depth, a target that is not of the user's own packages."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            if not isinstance(value["_target_"], str):
                raise ValueError(f"{field}._target_: must be the name of a class, got {value['_target_']!r}")
            check(value, object, field, allow, ())
        else:
            for key, inner in value.items():
                check_inside(inner, f"{field}.{key}", allow)
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            check_inside(inner, f"{field}[{i}]", allow)


def _arguments(node: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in node.items() if key != "_target_"]


def _made(value: Any, field: str, allow: tuple[str, ...]) -> Any:
    """A value as it is, with the objects inside."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return build(value, object, field, allow)
        return {key: _made(inner, f"{field}.{key}", allow) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_made(inner, f"{field}[{i}]", allow) for i, inner in enumerate(value)]
    return value


def resolve(target: str, packages: tuple[str, ...], field: str) -> type:
    """The class of that name: an attribute of a module, both inside the allowed packages.

    Raises:
        ValueError: there is no such class, or it is outside of them, where nothing is imported.
    """
    module, _, name = target.rpartition(".")
    if not module:
        raise _outside(f"{field}: {target!r} is not inside", packages)
    check_module(target, packages, field)
    try:
        # nothing is walked through: `attnzoo.train.run.os` is an attribute, and no module of that name exists
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ValueError(f"{field}: there is no class {target!r}; give package.module.Class") from None
    if not isinstance(found, type) or not _inside(found.__module__, packages):
        raise _outside(f"{field}: {target!r} is no class of", packages)
    return found


def check_module(name: str, packages: tuple[str, ...], field: str) -> None:
    """Raise a ValueError if a dotted name is outside of the allowed packages; nothing is imported."""
    if not _DOTTED.fullmatch(name) or not _inside(name, packages):
        raise _outside(f"{field}: {name!r} is not inside", packages)


def _outside(problem: str, packages: Iterable[str]) -> ValueError:
    way = f"add its package by allow_targets=[...] on the command line, or {VARIABLE}, if you trust it"
    return ValueError(f"{problem} {', '.join(packages) or 'what the user allows'}; {way}")


def _inside(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)
