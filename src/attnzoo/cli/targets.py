"""What Hydra builds by itself, checked after each of its compositions and before it builds anything.

    hydra.callbacks          before a run and a multirun
    hydra.sweeper, launcher  for a multirun; objects inside of their arguments, too
    hydra.hydra_logging      at the start, by logging.config.dictConfig
    hydra.job_logging        in each job, likewise

A folder of configurations (--config-dir) is data as a checkpoint is: it may name Hydra's own sweeper and
launcher and the classes of Python's logging, and for the rest what the user has allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from attnzoo.secure import (
    VARIABLE,
    allowed_targets,
    check,
    check_inside,
    redact_arguments,
    resolve,
    secrets_in,
)

OWN = ("hydra._internal.core_plugins",)
PLUGINS = {"launcher": Launcher, "sweeper": Sweeper}
LOGGING = ("hydra_logging", "job_logging")
MADE = ("()", "class", "queue", "listener")  # keys of a logging configuration that name what is built
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
# what Hydra itself fills with text: nothing else is known before it builds
_TEXT = re.compile(
    r"\$\{hydra\.(job\.(name|id|num)|runtime\.(cwd|output_dir)|run\.dir|sweep\.(dir|subdir))\}"
)
_NO_ADDRESS = re.compile(r"\$\{hydra\.runtime\.output_dir\}|[^${]*[^a-z:/${]")  # text that begins so


@contextmanager
def checked_compositions() -> Iterator[None]:
    """Let Hydra refuse with a ValueError, for a while, what `check_composition` refuses."""
    load = ConfigLoaderImpl.load_configuration

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
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = load


def check_composition(config: DictConfig, overrides: Sequence[str], multirun: bool = False) -> None:
    """Raise a ValueError if Hydra would build what nobody has allowed, or a multirun would keep a secret.

    Args:
        overrides: of the command line, which alone may set ``allow_targets``.
    """
    found = OmegaConf.to_container(config, resolve=False)
    given = found.get("allow_targets") or ()
    if given and not any(_key(override) == "allow_targets" for override in overrides):
        raise ValueError(
            f"allow_targets: is for the command line or {VARIABLE} to say, got {given!r} from a file; "
            f"add allow_targets={_listed(given)} if you trust it"
        )
    allow = allowed_targets(config.get("allow_targets") or ())
    hydra = found["hydra"]
    if VARIABLE in _mapping(hydra["job"]["env_set"], "hydra.job.env_set"):
        raise ValueError(
            f"hydra.job.env_set.{VARIABLE}: a configuration must not set it, got "
            f"{hydra['job']['env_set'][VARIABLE]!r}; set it in the environment"
        )
    for name, kind in PLUGINS.items():
        _check_built(hydra[name], kind, f"hydra.{name}", allow)
    for name, node in _mapping(hydra["callbacks"], "hydra.callbacks").items():
        _check_built(node, Callback, f"hydra.callbacks.{name}", allow)
    for name in LOGGING:
        _check_logging(hydra[name], f"hydra.{name}", allow)
    for name in hydra.keys() - {*PLUGINS, *LOGGING, "callbacks"}:
        check_inside(hydra[name], f"hydra.{name}", allow)
    if multirun:
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


def _check_logging(node: Any, field: str, allow: tuple[str, ...]) -> None:
    if node is None:
        return
    packages = ("logging", *allow)
    for key, text in _texts(node, field):
        name = key.rpartition(".")[2]
        if "${" in text and not _NO_ADDRESS.match(text):
            raise _refers(key, text)
        if name in MADE:
            resolve(text, packages, key)
        elif text.startswith("ext:") and text not in STREAMS:
            raise ValueError(f"{key}: must be {' or '.join(STREAMS)}, got {text!r}; or a value of its own")


def _check_secrets(found: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Hydra writes multirun.yaml: the configuration as it was given, and the command line."""
    keys = [_key(a) for a in overrides if "${" not in a and redact_arguments([a]) != [a]]
    if keys := [*keys, *secrets_in(found)]:
        raise ValueError(
            f"{keys[0]}: holds a secret, which the file of a multirun would keep, got ***; let the library "
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
