"""The raw documents of a run as one Hugging Face dataset with a `text` column, whatever they come from."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .config import DataConfig
from .files import first_line, missing, not_text, read_file, read_stdlib, stdlib_files, text_files

if TYPE_CHECKING:
    import datasets


def source_key(cfg: DataConfig) -> list:
    """What tells this source from another without reading it.

    Local files count by path, size and time of change, so that opening a known corpus costs one `stat` per
    file; a dataset of the Hub counts by its name alone (delete the cache folder to follow a changed one).

    Raises:
        ValueError: `data.path` names nothing, or nothing usable.
    """
    limits = [cfg.max_documents, cfg.max_bytes]
    if cfg.name == "stdlib":
        return [cfg.name, _stamps(stdlib_files()), *limits]
    if cfg.name == "text":
        return [cfg.name, _stamps(text_files(cfg.path)), cfg.field, cfg.errors, *limits]
    folder = local_folder(cfg)
    stamps = _stamps(files_below(folder)) if folder else cfg.path
    return [cfg.name, stamps, cfg.subset, cfg.split, cfg.field, cfg.revision, *limits]


def load_documents(cfg: DataConfig, folder: Path) -> datasets.Dataset:
    """Reads the source once, up to the configured limits, into an Arrow file under `folder`.

    The steps after it (split, vocabulary, tokenisation) each pass over the text; reading from the copy, they
    see the same documents even if a file changes meanwhile, and a streamed dataset is fetched once.

    Raises:
        ValueError: the source is missing, empty or not readable; the message names the file and the way out.
    """
    import datasets

    features = datasets.Features(text=datasets.Value("large_string"))
    with progress_on_terminals_only():
        try:
            return datasets.Dataset.from_generator(
                _rows, features=features, cache_dir=str(folder), gen_kwargs={"cfg": cfg}
            )
        except datasets.exceptions.DatasetGenerationError as error:
            raise (error.__cause__ or error) from None


def _rows(cfg: DataConfig) -> Iterator[dict[str, str]]:
    empty = True
    for text in texts_of(cfg):
        empty = False
        yield {"text": text}
    if empty:
        raise ValueError(f"data.path: {cfg.path!r} holds no text; give files or rows that are not empty")


def texts_of(cfg: DataConfig) -> Iterator[str]:
    """The documents of the source in their order, none of them empty, up to the configured limits."""
    return _limited(_texts(cfg), cfg.max_documents, cfg.max_bytes)


def _texts(cfg: DataConfig) -> Iterable[str]:
    if cfg.name == "stdlib":
        return read_stdlib(stdlib_files())
    if cfg.name == "text":
        return (text for file in text_files(cfg.path) for text in read_file(file, cfg.field, cfg.errors))
    return _hf_texts(cfg)


def _limited(texts: Iterable[str], max_documents: int | None, max_bytes: int | None) -> Iterator[str]:
    """The non-empty documents until a limit is reached; the document that reaches it is still whole."""
    count = size = 0
    for text in texts:
        if text:
            yield text
            count, size = count + 1, size + len(text.encode())
            if count == max_documents or (max_bytes is not None and size >= max_bytes):
                return


def _hf_texts(cfg: DataConfig) -> Iterator[str]:
    return field_texts(hf_rows(cfg), cfg)


def hf_rows(cfg: DataConfig) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of the split, with the column of the text only."""
    with _named(cfg.path):
        splits = _hf_splits(cfg)
    if cfg.split not in splits:
        raise missing("data.split", cfg.split, cfg.path, splits)
    rows = splits[cfg.split]
    with _named(cfg.path):
        columns = rows.column_names or list(next(iter(rows), {}))
    if cfg.field not in columns:
        raise missing("data.field", cfg.field, cfg.path, columns)
    return rows.select_columns([cfg.field])


def field_texts(rows: datasets.Dataset | datasets.IterableDataset, cfg: DataConfig) -> Iterator[str]:
    """The text of each row, in order."""
    # not __iter__: in a loader's worker process, that of a stream leaves out what other workers should read
    batches = rows.iter(batch_size=64)
    while True:
        with _named(cfg.path):
            batch = next(batches, None)
        if batch is None:
            return
        for text in batch[cfg.field]:
            if not isinstance(text, str):
                raise not_text(cfg.field, cfg.path, text)
            yield text


def _hf_splits(cfg: DataConfig) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """The splits by name. A path that is no local folder goes to `datasets`, which honours HF_HUB_OFFLINE."""
    import datasets

    folder = local_folder(cfg)
    if folder and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        found = datasets.load_from_disk(str(folder))
        return found if isinstance(found, dict) else {str(found.split or "train"): found}
    streaming = cfg.streaming or cfg.name == "stream"
    return datasets.load_dataset(
        str(folder or cfg.path), cfg.subset, streaming=streaming, revision=cfg.revision
    )


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Whatever a loader, the network or a parser raises inside becomes one line about `data.path`."""
    try:
        yield
    except Exception as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"data.path: no dataset from '{path}' ({type(reason).__name__}: {first_line(reason)}); "
            "give a folder of data files, a saved dataset, or a name that can be fetched or is cached"
        ) from None


def local_folder(cfg: DataConfig) -> Path | None:
    """The folder that `data.path` names, None for the name of a dataset."""
    path = cfg.path
    folder = Path(path).expanduser()
    if folder.is_dir():
        if cfg.revision is not None:
            raise ValueError(
                f"data.revision: only datasets of the Hub have one and '{path}' is a folder, "
                f"got {cfg.revision!r}; leave it out"
            )
        return folder
    if folder.exists():
        raise ValueError(f"data.path: '{path}' is a file and data=hf takes a folder or a name; use data=text")
    # Names on the Hub have at most one slash and start with a letter or digit: all else was meant as a path.
    if len(folder.parts) > 2 or not path[0].isalnum():
        raise ValueError(f"data.path: no folder '{path}'; give a folder that exists or a dataset's name")
    return None


def files_below(folder: Path) -> list[Path]:
    """All files in `folder` and below, sorted."""
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _stamps(files: list[Path]) -> list[list]:
    found = []
    for file in files:
        stat = file.stat()
        found.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    return found


@contextlib.contextmanager
def progress_on_terminals_only() -> Iterator[None]:
    import datasets

    hide = not sys.stderr.isatty() and not datasets.utils.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
