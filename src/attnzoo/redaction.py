"""Secrets stay out of what is written down, printed and logged."""

from __future__ import annotations

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

HIDDEN = "***"
SECRET = (
    *("key", "apikey", "token", "secret", "password", "passwd", "pass", "passphrase"),
    *("credential", "credentials"),
)
SHORTEST = 8  # characters of an environment's secret: shorter ones would hide ordinary words

_USER_IN_URL = re.compile(r"(?<=://)[^/@\s'\"]+@")
_SECRET_IN_URL = re.compile(r"(?i)([?&](?:[\w-]*(?:token|key|secret|password|signature)|sig)=)[^&\s'\"]+")


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


def redact_output() -> None:
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
