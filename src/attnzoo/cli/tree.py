"""The Hydra tree: where it is, what it holds, and one composition of it; its errors become one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attnzoo import list_variants
from attnzoo.cli.overrides import describe, flatten
from attnzoo.cli.targets import checked_compositions


def config_folder() -> Path:
    """The Hydra tree: inside the installed package, or beside ``src/`` in a source tree."""
    package = Path(str(files("attnzoo")))
    return next(path for path in (package / "configs", package.parents[1] / "configs") if path.is_dir())


def store_variants() -> None:
    """Let `attention=` know the variants of other packages, which have no YAML in the tree."""
    OmegaConf.register_new_resolver("part", path_part, replace=True)
    shipped = {path.stem for path in (config_folder() / "attention").glob("*.yaml")}
    for name in set(list_variants()) - shipped:
        ConfigStore.instance().store(group="attention", name=name, node={"name": name})


def path_part(value: Any) -> str:
    """``${part:...}``: a value as a part of a folder's name, which must not lead elsewhere."""
    if not re.fullmatch(r"\w[\w.+-]*|-\d+", str(value)):
        raise ValueError(f"hydra.run.dir: must be made of names without / and blanks, got {value!r}")
    return str(value)


@contextmanager
def opened() -> Iterator[None]:
    """Hydra on the tree: `hydra.compose` works inside."""
    GlobalHydra.instance().clear()
    store_variants()
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        yield


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn Hydra's and OmegaConf's errors into a ValueError of one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(describe(error, _known_keys(), _nested_choices())) from error


def compose(overrides: Sequence[str], hydra_too: bool = False) -> DictConfig:
    """One checked composition, inside `opened`; with Hydra's own node if ``hydra_too``."""
    with checked_compositions(overrides):
        return hydra.compose("config", list(overrides), return_hydra_config=hydra_too)


def _known_keys() -> set[str]:
    with opened():
        tree = OmegaConf.to_container(compose([]), resolve=False)
    return set(flatten(tree))


def _nested_choices() -> list[str]:
    root = config_folder()
    return [path.relative_to(root).with_suffix("").as_posix() for path in root.glob("*/*/*.yaml")]
