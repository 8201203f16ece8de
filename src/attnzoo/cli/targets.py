"""What Hydra imports and builds by itself, checked before it does.

    --config-path,           packages whose folders hold configurations, imported to compose
      hydra.searchpath
    hydra.callbacks          before a run and a multirun
    hydra.sweeper, launcher  for a multirun; objects inside of their arguments, too
    hydra.hydra_logging      at the start, by logging.config.dictConfig
    hydra.job_logging        in each job, likewise

A folder of configurations (--config-dir) is data as a checkpoint is: it may name Hydra's own sweeper and
launcher and the simple classes of Python's logging, which then write to the terminal and to the run's folder,
and for the rest what the user has allowed. It sets no variables of the environment, some of which name code
(PYTHONPATH).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from attnzoo.redaction import redact, redact_arguments, secrets_in
from attnzoo.secure import (
    PACKAGES,
    VARIABLE,
    allowed_targets,
    check,
    check_inside,
    check_module,
    resolve,
)

OWN = ("hydra._internal.core_plugins",)
# by Hydra's name for who asked for it; other sources are Hydra's own and those of installed plugins
SOURCES = {
    "main": "--config-path",
    "hydra.searchpath in main": "hydra.searchpath",
    "hydra.searchpath in command-line": "hydra.searchpath",
}
PLUGINS = {"launcher": Launcher, "sweeper": Sweeper}
LOGGING = ("hydra_logging", "job_logging")
MADE = ("()", "class", "queue", "listener")  # keys of a logging configuration that name what is built
CLASSES = tuple(
    f"logging.{name}" for name in ("StreamHandler", "FileHandler", "NullHandler", "Formatter", "Filter")
)
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_NAME = r"\$\{hydra\.job\.name\}"
# the second is Hydra's own
_LOG = re.compile(rf"\$\{{hydra\.runtime\.output_dir\}}/({_NAME}|[\w-]+)\.log|hydra-{_NAME}\.log")
# what Hydra itself fills with text: nothing else is known before it builds
_TEXT = re.compile(
    r"\$\{hydra\.(job\.(name|id|num)|runtime\.(cwd|output_dir)|run\.dir|sweep\.(dir|subdir))\}"
)
_NO_ADDRESS = re.compile(r"\$\{hydra\.runtime\.output_dir\}|[^${]*[^a-z:/${]")  # text that begins so


@contextmanager
def checked_compositions(arguments: Sequence[str]) -> Iterator[None]:
    """Let Hydra refuse with a ValueError, for a while, what `check_composition` does, and to look for
    configurations in packages that nobody has allowed.

    Args:
        arguments: the command line, whose ``allow_targets`` are needed before it is composed.
    """
    load, open_sources = ConfigLoaderImpl.load_configuration, ConfigRepository.initialize_sources
    packages = (*PACKAGES, *_allowed_by(arguments))

    def checked_sources(self: ConfigRepository, config_search_path: ConfigSearchPath) -> None:
        for source in config_search_path.get_path():
            scheme, address, place = source.path.partition("://")
            if source.provider in SOURCES and address and scheme != "file":
                module = place.replace("/", ".").rstrip(".")  # as Hydra reads it
                check_module(module, packages, SOURCES[source.provider])
        open_sources(self, config_search_path)

    def checked(
        self: ConfigLoaderImpl,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        **more: Any,
    ) -> DictConfig:
        config = load(self, config_name, overrides, run_mode, **more)
        if more.get("validate_sweep_overrides", True):  # Hydra only looks for its mode, and drops errors
            check_composition(config, overrides, run_mode is RunMode.MULTIRUN)
        return config

    ConfigLoaderImpl.load_configuration = checked
    ConfigRepository.initialize_sources = checked_sources
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = load
        ConfigRepository.initialize_sources = open_sources


def _allowed_by(arguments: Sequence[str]) -> tuple[str, ...]:
    """What a command line and the environment add, by itself: what refers to a file is not known yet."""
    given = [argument for argument in arguments if _key(argument) == "allow_targets"]
    values = [override.value() for override in OverridesParser.create().parse_overrides(given)]
    return allowed_targets(values[-1] if values and isinstance(values[-1], list) else ())


def check_composition(config: DictConfig, overrides: Sequence[str], multirun: bool = False) -> None:
    """Raise a ValueError if Hydra would build what nobody has allowed, or its own files would keep a secret.

    Args:
        overrides: of the command line, which alone may set ``allow_targets`` and environment variables.
    """
    found = OmegaConf.to_container(config, resolve=False)
    given, said = found.get("allow_targets") or (), {_key(override) for override in overrides}
    if given and "allow_targets" not in said:
        raise ValueError(
            f"allow_targets: is for the command line or {VARIABLE} to say, got {given!r} from a file; "
            f"add allow_targets={_listed(given)} if you trust it"
        )
    allow = allowed_targets(config.get("allow_targets") or ())
    hydra = found["hydra"]
    for name, value in _mapping(hydra["job"]["env_set"], "hydra.job.env_set").items():
        key = f"hydra.job.env_set.{name}"
        if name == VARIABLE or (key not in said and value != os.environ.get(name)):
            raise ValueError(
                f"{key}: a configuration must not set it, got {redact(value, name)!r}; "
                "set it in the environment"
            )
    for name, kind in PLUGINS.items():
        _check_built(hydra[name], kind, f"hydra.{name}", allow)
    for name, node in _mapping(hydra["callbacks"], "hydra.callbacks").items():
        _check_built(node, Callback, f"hydra.callbacks.{name}", allow)
    for name in LOGGING:
        _check_logging(hydra[name], f"hydra.{name}", allow, said)
    job = hydra["job"]["name"]  # part of the name of a file
    if "hydra.job.name" not in said and re.search(r"[/\\]", str(job)):
        raise ValueError(f"hydra.job.name: must be no path in a file, got {job!r}; give it without folders")
    for name in hydra.keys() - {*PLUGINS, *LOGGING, "callbacks"}:
        check_inside(hydra[name], f"hydra.{name}", allow)
    if multirun or hydra["output_subdir"] is not None:
        _check_secrets(found, overrides)


def _check_built(node: Any, kind: type, field: str, allow: tuple[str, ...]) -> None:
    if node is None:
        return
    for key, text in _texts(node, field):
        # a text with more than a reference stays a text
        whole = text.startswith("${") and text.endswith("}") and not _TEXT.fullmatch(text)
        if "${" in text and (whole or key.endswith("._target_")):
            raise _refers(key, text)
    check(node, kind, field, allow, OWN)


def _check_logging(node: Any, field: str, allow: tuple[str, ...], said: set[str]) -> None:
    if node is None:
        return
    for key, text in _texts(node, field):
        name = key.rpartition(".")[2]
        # under "." are attributes of what is made: those of a file's handler may name another file
        if (name == "filename" or "..." in key) and key not in said and not _LOG.fullmatch(text):
            raise ValueError(
                f"{key}: a file may log to ${{hydra.runtime.output_dir}}/NAME.log only, got {text!r}; "
                "give another place on the command line"
            )
        if "${" in text and not _NO_ADDRESS.match(text):
            raise _refers(key, text)
        if name in MADE:
            check_module(text, (*CLASSES, *allow), key)
            resolve(text, ("logging", *allow), key)
        elif text.startswith("ext:") and text not in STREAMS:
            raise ValueError(f"{key}: must be {' or '.join(STREAMS)}, got {text!r}; or a value of its own")


def _check_secrets(found: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Hydra writes multirun.yaml and output_subdir: the configuration as given, and the command line."""
    keys = [_key(a) for a in overrides if "${" not in a and redact_arguments([a]) != [a]]
    if keys := [*keys, *secrets_in(found)]:
        raise ValueError(
            f"{keys[0]}: holds a secret, which Hydra's own files would keep, got ***; let the library "
            "that needs it read the environment, or give it as ${oc.env:NAME}"
        )


def _texts(node: Any, field: str) -> Iterator[tuple[str, str]]:
    """All texts at or below a node, each with its dotted key."""
    if isinstance(node, str):
        yield field, node
    elif isinstance(node, Mapping):
        for key, inner in node.items():
            yield from _texts(inner, f"{field}.{key}")
    elif isinstance(node, (list, tuple)):
        for i, inner in enumerate(node):
            yield from _texts(inner, f"{field}[{i}]")


def _mapping(node: Any, field: str) -> Mapping[str, Any]:
    if isinstance(node, str):
        raise _refers(field, node)
    return node or {}


def _refers(field: str, text: str) -> ValueError:
    return ValueError(f"{field}: must say itself what Hydra builds, got {text!r}; write it without ${{...}}")


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _listed(names: Any) -> str:
    return f"[{','.join(map(str, names))}]" if isinstance(names, list) else str(names)
