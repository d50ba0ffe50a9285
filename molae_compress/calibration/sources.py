"""Sources of text: files, folders, hub datasets, and the built-in texts.

What needs more than the standard library is imported only when such a source is read.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from molae_compress.errors import DataError

BUILT_IN = ("python-docs:calibration", "python-docs:heldout")
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:\[(?P<config>[^\]]+)\])?(?:\((?P<split>[^()]+)\))?")


class _Wanted(NamedTuple):
    """What a column is to hold."""

    kind: type
    word: str


_TEXT, _CONVERSATION = _Wanted(str, "text"), _Wanted(list, "a list of messages")
Message = dict[str, Any]


def read_source(source: str, column: str) -> list[str]:
    """The documents of one source, blank ones left out.

    Args:
        source: an entry of `calibration.data`.
        column: the column or key that holds the text, where the source has several.

    Raises:
        DataError: the source does not exist, cannot be read, holds no text, or has no such column.
    """
    path = Path(source)
    texts: Iterable[str | None]
    if source.startswith("python-docs:"):
        texts = _built_in(source)
    elif path.is_dir():
        texts = _folder(path)
    else:
        texts = _of_column(source, column, _TEXT)
    filled = [text for text in texts if text and not text.isspace()]
    if not filled:
        raise DataError(f"'{source}' holds no text.", remedy="Fill it, or remove it from the sources.")
    return filled


def read_conversations(source: str, column: str) -> list[list[Message]]:
    """The conversations of one source, empty ones left out: lists of messages with `role` and `content`.

    Args:
        source: a `.jsonl`, `.json` or `.parquet` file, or a hub dataset.
        column: the column or key that holds them.

    Raises:
        DataError: the source does not exist, cannot be read, holds none, or holds something else in that column.
    """
    if source.startswith("python-docs:") or Path(source).is_dir() or Path(source).suffix.lower() == ".txt":
        raise DataError(
            f"'{source}' holds plain text, no conversations.",
            remedy='Give a .jsonl file of rows such as {"messages": [{"role": "user", "content": "..."}, ...]}, or leave '
            "`chat` out.",
        )
    found = [messages for messages in _of_column(source, column, _CONVERSATION) if messages]
    for number, messages in enumerate(found, start=1):
        if not all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages):
            raise DataError(
                f"Conversation {number} of '{source}' has a message without `role` and `content`.",
                remedy='Write each as {"role": "user", "content": "..."}.',
            )
    if not found:
        raise DataError(f"'{source}' holds no conversations.", remedy="Fill it, or remove it from the sources.")
    return found


def _of_column(source: str, column: str, wanted: _Wanted) -> Iterable[Any]:
    path = Path(source)
    if path.exists():
        return _file(path, column, wanted)
    if match := _as_hub_dataset(source):
        return _hub_dataset(match, column, wanted)
    raise _missing(path)


def _built_in(source: str) -> list[str]:
    """The help topics of this Python; every fifth, in order of their names, is held out."""
    if source not in BUILT_IN:
        raise DataError(f"There is no built-in text '{source}'.", remedy=f"There are {' and '.join(BUILT_IN)}.")
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    names = sorted(topics)
    held_out = set(names[::5])
    return [topics[name] for name in names if (name in held_out) == (source == BUILT_IN[1])]


def _folder(folder: Path) -> list[str]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".txt")
    if not files:
        raise DataError(f"The folder '{folder}' has no .txt files.", remedy="Name a folder of .txt files, or a single file.")
    return [_decoded(path) for path in files]


def _file(path: Path, column: str, wanted: _Wanted) -> list[Any]:
    match path.suffix.lower():
        case ".txt":
            return [_decoded(path)]
        case ".jsonl":
            # Not `splitlines`: it also cuts at separators that may stand inside a JSON string.
            lines = [(number, line) for number, line in enumerate(_decoded(path).split("\n"), start=1) if line.strip()]
            return [_jsonl_field(line, column, f"Line {number} of '{path}'", wanted) for number, line in lines]
        case ".json":
            return _json_fields(path, column, wanted)
        case ".parquet":
            return _parquet_column(path, column, wanted)
    raise DataError(
        f"'{path}' has the suffix '{path.suffix}', which cannot be read as text.",
        remedy=f"Convert it to one of {', '.join(SUFFIXES)}.",
    )


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8: the byte 0x{error.object[error.start]:02x} at offset {error.start} is invalid.",
            remedy=f"Convert it, for example with `iconv -f latin1 -t utf-8 {path.name}`.",
        ) from error


def _jsonl_field(line: str, column: str, where: str, wanted: _Wanted) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON ({error.msg}, column {error.colno}).", remedy="Write one JSON object a line."
        ) from error
    return _field(row, column, where, wanted)


def _json_fields(path: Path, column: str, wanted: _Wanted) -> list[Any]:
    try:
        rows = json.loads(_decoded(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"'{path}' is not JSON ({error.msg}, line {error.lineno}, column {error.colno}).",
            remedy="If it holds one object a line, name it .jsonl.",
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"'{path}' is not a JSON list.", remedy="Write a list of texts, or of objects with a text each.")
    return [
        row if isinstance(row, wanted.kind) else _field(row, column, f"Entry {number} of '{path}'", wanted)
        for number, row in enumerate(rows, start=1)
    ]


def _field(row: Any, column: str, where: str, wanted: _Wanted) -> Any:
    """What one row holds in its column; None, as in data with gaps, counts as nothing."""
    if not isinstance(row, dict):
        raise DataError(f"{where} is not an object with keys.", remedy=f'Write it as {{"{column}": "..."}}.')
    _check_column(column, row, where)
    value = row[column]
    if value is not None and not isinstance(value, wanted.kind):
        raise DataError(
            f"{where} has {type(value).__name__} under '{column}', not {wanted.word}.",
            remedy=f"Name a `column` that holds {wanted.word}.",
        )
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise DataError(f"{where} holds half a character (a lone surrogate).", remedy="Repair or remove this text.")
    return value


def _parquet_column(path: Path, column: str, wanted: _Wanted) -> list[Any]:
    parquet = _from_data_extra("pyarrow.parquet", f"'{path}'")
    try:
        file = parquet.ParquetFile(path)
        _check_column(column, file.schema_arrow.names, f"'{path}'")
        return _all_of(wanted, file.read(columns=[column]).column(column).to_pylist(), column, f"'{path}'")
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these
        raise DataError(f"'{path}' cannot be read as parquet ({error}).") from error


def _hub_dataset(match: re.Match[str], column: str, wanted: _Wanted) -> list[Any]:
    name, config, split = match["name"], match["config"], match["split"] or "train"
    subject = f"the hub dataset '{match[0]}'"
    datasets = _from_data_extra("datasets", subject)
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"Loading {subject} failed ({error}).",
            why="There is no file or folder of this name here, so it was looked for on the hub.",
            remedy="Write org/name[configuration](split), or name a file.",
        ) from error
    _check_column(column, dataset.column_names, f"T{subject[1:]}")
    return _all_of(wanted, dataset[column], column, subject)


def _all_of(wanted: _Wanted, values: Iterable[Any], column: str, where: str) -> list[Any]:
    found = list(values)
    wrong = next((value for value in found if value is not None and not isinstance(value, wanted.kind)), None)
    if wrong is not None:
        raise DataError(
            f"The column '{column}' of {where} holds {type(wrong).__name__}, not {wanted.word}.",
            remedy=f"Name a `column` that holds {wanted.word}.",
        )
    return found


def _check_column(column: str, columns: Iterable[str], where: str) -> None:
    names = list(columns)
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1)
        raise DataError(
            f"{where} has no column '{column}'.",
            why=f"Its columns are {', '.join(names)}.",
            remedy=f"Did you mean `column: {near[0]}`?" if near else "Name one of them as `column`.",
        )


def _from_data_extra(module: str, subject: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"Reading {subject} needs the package '{module.partition('.')[0]}', which is not installed.",
            remedy="Install it with `pip install 'molae-compress[data]'`, or give the text as .txt or .jsonl.",
        ) from error


def _as_hub_dataset(source: str) -> re.Match[str] | None:
    """`source` taken apart if it can only mean a hub dataset; None if it rather is a path with a typing error."""
    match = _HUB.fullmatch(source)
    if match is None or match["config"] or match["split"]:
        return match
    path = Path(source)
    is_path = source.startswith(".") or path.suffix.lower() in SUFFIXES or path.parent.is_dir()
    return None if is_path else match


def _missing(path: Path) -> DataError:
    folder = path.parent
    if not folder.is_dir():
        return DataError(
            f"There is no file or folder '{path}'.",
            why=f"The folder '{folder}' does not exist.",
            remedy="Paths start at the current directory. A hub dataset is written org/name[configuration](split).",
        )
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in folder.iterdir()))
    guess = f"Did you mean {' or '.join(repr(str(folder / name)) for name in near)}?" if near else ""
    could_be_hub = _HUB.fullmatch(str(path)) and path.suffix.lower() not in SUFFIXES
    hub = f"If you mean the hub dataset, name its split: {path}(train)." if could_be_hub else ""
    return DataError(
        f"There is no file or folder '{path}'.",
        remedy=" ".join(part for part in (guess, hub) if part) or "Paths start at the current directory.",
    )
