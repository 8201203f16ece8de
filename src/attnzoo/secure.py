"""What a configuration may build, and what of it may be written down.

A run folder, a sweep or a checkpoint from elsewhere is data: it can ask for classes of attnzoo, torch and
lightning that are callbacks or loggers, and for nothing else. Only the user's own command line
(``allow_targets=[package.module]``) or environment (ATTNZOO_ALLOW_TARGETS) adds to that.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO
from urllib.parse import quote

PACKAGES = ("attnzoo", "torch", "lightning", "pytorch_lightning")
VARIABLE = "ATTNZOO_ALLOW_TARGETS"
HIDDEN = "***"
SECRET = (
    *("key", "apikey", "token", "secret", "password", "passwd", "pass", "passphrase"),
    *("credential", "credentials"),
)
SHORTEST = 8  # characters of an environment's secret: shorter ones would hide ordinary words

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s'\"]+@")
_SECRET_IN_URL = re.compile(r"(?i)([?&](?:[\w-]*(?:token|key|secret|password|signature)|sig)=)[^&\s'\"]+")


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


def redact(value: Any, key: str = "") -> Any:
    """A configuration without its secrets, for a file or a log; equal to it where it holds none.

    Hidden are texts under a name such as api_key, token, secret or password, what stands before the @ of a
    URL, and wherever they appear the values of environment variables with such a name.
    """
    if isinstance(value, Mapping):
        return {name: redact(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(redact(inner, key) for inner in value)
    if not isinstance(value, str):
        return value
    return HIDDEN if value and is_secret(key) else redact_text(value)


def secrets_in(value: Any, key: str = "") -> Iterator[str]:
    """Dotted keys of a configuration's secrets; what is still to be resolved is none."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from secrets_in(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from secrets_in(inner, key)
    elif redact(value, key.rpartition(".")[2]) != value and "${" not in value:
        yield key


def redact_text(text: str) -> str:
    """The text without credentials in URLs and secrets of the environment, as they are or quoted."""
    for secret in _environment_secrets():
        text = text.replace(secret, HIDDEN)
    return _SECRET_IN_URL.sub(rf"\g<1>{HIDDEN}", _USER_IN_URL.sub(f"{HIDDEN}@", text))


def redact_arguments(arguments: Iterable[str]) -> list[str]:
    """A command line of key=value without secrets."""
    hidden = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        shown = HIDDEN if equals and value and is_secret(key.rpartition(".")[2]) else redact_text(value)
        hidden.append(f"{key}{equals}{shown}")
    return hidden


@contextmanager
def plain_command_line() -> Iterator[None]:
    """sys.argv without secrets for a while: experiment trackers record it."""
    before, sys.argv = sys.argv, redact_arguments(sys.argv)
    try:
        yield
    finally:
        sys.argv = before


def is_secret(name: str) -> bool:
    """Whether the last word of a name says that its value is secret: api_key, HF_TOKEN, dbPassword."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return bool(words) and words[-1].lower() in SECRET


def print_error(error: BaseException) -> None:
    """Python's traceback on stderr, without secrets."""
    print(redact_text("".join(traceback.format_exception(error))), end="", file=sys.stderr, flush=True)


def redact_tracebacks() -> None:
    """Let this process print without secrets what nobody catches, in any thread and where none can, and the
    lines of Python's logging and warnings, whichever library says them.
    """

    def of_process(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        print_error(error)

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            name = args.thread.name if args.thread else "unknown"
            print(redact_text(f"Exception in thread {name}:"), file=sys.stderr)
            print_error(args.exc_value)

    def unraisable(args: Any) -> None:
        print(redact_text(f"{args.err_msg or 'Exception ignored in'}: {args.object!r}"), file=sys.stderr)
        if args.exc_value is not None:
            print_error(args.exc_value)

    sys.excepthook, threading.excepthook, sys.unraisablehook = of_process, of_thread, unraisable
    form = logging.Handler.format  # what all handlers write, whatever their formatters make of a record
    logging.Handler.format = lambda handler, record: redact(form(handler, record))
    logging.Handler.handleError = _cannot_log
    warnings.showwarning = _show_warning


def _cannot_log(handler: logging.Handler, record: logging.LogRecord) -> None:
    """Of a message that does not take its arguments, or a file that cannot be written."""
    error = sys.exc_info()[1]
    with suppress(Exception):  # as Python's own, where stderr is closed or arguments cannot be shown
        if logging.raiseExceptions and sys.stderr and error:
            print_error(error)
            said = f"cannot log {record.msg!r} with {record.args!r} at {record.pathname}:{record.lineno}"
            print(redact_text(said), file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Libraries replace how warnings are formatted, and leave this in place."""
    with suppress(OSError, AttributeError):  # as Python's own, where stderr is closed or None
        text = redact_text(warnings.formatwarning(message, category, filename, lineno, line))
        (file or sys.stderr).write(text)


def _environment_secrets() -> list[str]:
    """Longest first; also as messages quote them, and by their lines, because messages are taken apart."""
    found = set()
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and is_secret(name):
            found |= {value, repr(value)[1:-1], json.dumps(value)[1:-1], quote(value), quote(value, safe="")}
            found |= {line.strip() for line in value.splitlines() if len(line.strip()) >= SHORTEST}
    return sorted(found, key=len, reverse=True)
