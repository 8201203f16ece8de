"""Documents from local files: which files a path means, and the text inside each."""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

PLAIN = (".txt", ".text", ".md", ".rst")
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
READABLE = PLAIN + JSON_LINES + PARQUET

# Tests are left out because many distributions do not ship them, and `encodings` because its tables are near
# copies of each other, which would put almost the same text on both sides of the split.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}


def stdlib_files() -> list[Path]:
    """Sources and documentation texts of the running Python's standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_SKIPPED]
        for name in names:
            # _sysconfigdata*.py lists the build machine's paths: no text, and different on every machine.
            if name.endswith((".py", *PLAIN)) and not name.startswith("_sysconfigdata"):
                files.append(Path(folder, name))
    if not files:
        raise ValueError(
            f"data.name: stdlib reads the standard library's sources, and '{root}' has none; use data=text"
        )
    return sorted(files, key=lambda file: file.relative_to(root).parts)


def text_files(paths: str | tuple[str, ...]) -> list[Path]:
    """The files that `data.path` means, each once: it may name files, directories (all below) and globs.

    Raises:
        ValueError: a path or glob that matches nothing, or a directory without a readable file.
    """
    found: dict[Path, None] = {}
    for path in (paths,) if isinstance(paths, str) else paths:
        expanded = Path(path).expanduser()
        if expanded.is_dir():
            matches = sorted(file for file in _files(expanded.rglob("*")) if file.suffix in READABLE)
            if not matches:
                raise ValueError(
                    f"data.path: directory '{path}' holds no {', '.join(READABLE)} file; "
                    "name other files themselves or by a glob"
                )
        elif expanded.exists():
            matches = [expanded]
        elif glob.has_magic(path):
            matches = sorted(_files(map(Path, glob.iglob(str(expanded), recursive=True))))
            if not matches:
                raise ValueError(f"data.path: no file matches '{path}'; give a file, a directory or a glob")
        else:
            raise ValueError(f"data.path: '{path}' does not exist; give a file, a directory or a glob")
        found.update(dict.fromkeys(matches))
    return list(found)


def read_stdlib(files: list[Path]) -> Iterator[str]:
    """The text of each source file; the few that are not UTF-8 (their coding line says so) are left out."""
    for file in files:
        try:
            yield file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue


def read_file(file: Path, field: str, errors: str) -> Iterator[str]:
    """The documents of one file: its `field` per row for JSON lines and parquet, else the whole file.

    Args:
        errors: "strict" refuses bytes that are not UTF-8, "replace" reads them as U+FFFD.

    Raises:
        ValueError: a file that cannot be read or parsed, text that is not UTF-8, a missing field.
    """
    if file.suffix in PARQUET:
        return _parquet(file, field, errors)
    return _json_lines(file, field, errors) if file.suffix in JSON_LINES else iter([_plain(file, errors)])


def _plain(file: Path, errors: str) -> str:
    try:
        return _decode(file.read_bytes(), file, errors)
    except OSError as error:
        raise _unreadable(file, error.strerror) from None


def _decode(data: bytes, where: object, errors: str, at: int = 0) -> str:
    """`data`, which starts at byte `at` of `where`, as text."""
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.path: '{where}' is not UTF-8 at byte {at + error.start}; "
            "convert it or set data.errors=replace"
        ) from None


def _json_lines(file: Path, field: str, errors: str) -> Iterator[str]:
    try:
        with open(file, "rb") as lines:
            offset = 0
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_field(_decode(line, file, errors, offset), f"{file}:{number}", field, errors)
                offset += len(line)
    except OSError as error:
        raise _unreadable(file, error.strerror) from None


def _json_field(line: str, where: str, field: str, errors: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"data.path: '{where}' is not JSON ({error.msg} at column {error.colno}); "
            "give one JSON object per line"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"data.path: '{where}' holds a {type(row).__name__}; give one JSON object per line")
    if field not in row:
        raise missing("data.field", field, where, row)
    text = row[field]
    if not isinstance(text, str):
        raise not_text(field, where, text)
    try:
        # JSON can escape half a surrogate pair, which is no Unicode text and has no UTF-8 form.
        return text.encode("utf-8", errors).decode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"data.path: '{where}' escapes half a surrogate pair; mend it or set data.errors=replace"
        ) from None


def _parquet(file: Path, field: str, errors: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        columns = table.schema_arrow.names
        if field not in columns:
            raise missing("data.field", field, file, columns)
        row = 0
        for batch in table.iter_batches(columns=[field], batch_size=1024):
            # As bytes, because text that is not UTF-8 would stop the conversion without saying where.
            for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                if value is None:
                    raise not_text(field, f"{file}, row {row}", value)
                yield _decode(value, f"{file}, row {row}", errors)
                row += 1
    except pa.ArrowNotImplementedError:
        raise not_text(field, file, table.schema_arrow.field(field).type) from None
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, first_line(error)) from None


def missing(key: str, value: str, where: object, there: Iterable[str]) -> ValueError:
    """The error for a field or split that `where` does not have."""
    return ValueError(f"{key}: no {value!r} in '{where}'; choose one of {', '.join(there) or 'none'}")


def not_text(field: str, where: object, value: object) -> ValueError:
    """The error for a field that holds something else than text."""
    return ValueError(
        f"data.field: {field!r} must hold text, is {value!s:.40} in '{where}'; name another field"
    )


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in paths if path.is_file())


def _unreadable(file: Path, reason: str) -> ValueError:
    return ValueError(f"data.path: '{file}' cannot be read ({reason}); mend it or leave it out")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, for an error of ours that must stay on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
