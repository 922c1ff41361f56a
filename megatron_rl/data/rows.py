"""Rows of problem files: JSON lines or a JSON list, CSV, Parquet, Hugging Face `datasets` on a disk.

Text may be gzip or zstd, and may begin with a byte-order mark. The first bytes of a file tell its format.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_rl.config.schema import DataConfig
from megatron_rl.data.tables import arrow_files, arrow_rows, parquet_files, parquet_rows
from megatron_rl.foreign import load_function, told

__all__ = ["FILE_SOURCES", "BadRow", "Row", "data_path", "read_file", "read_rows"]

FILE_SOURCES = ("jsonl", "parquet", "hf_dataset")
GZIP, ZSTD, MARK = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf"


class BadRow(ValueError):
    """One row cannot be used; the message says why."""


@dataclass(frozen=True)
class Row:
    """One row and its place: `where` for messages (path:12, or path row 12), `name` for ids (file:12). Counted from 1.

    fields: column -> value, or the reason why there are none.
    """

    where: str
    name: str
    fields: dict[str, Any] | BadRow


def data_path(config: DataConfig) -> Path:
    """data.path, which must exist: a file for jsonl, a folder for hf_dataset, either for parquet."""
    if config.path is None:
        raise ValueError(f"data.source={config.source} needs data.path")
    path = Path(config.path)
    if config.source == "hf_dataset":
        if not path.is_dir():
            raise ValueError(f"data.path={path} is not a folder that Dataset.save_to_disk wrote "
                             f"(looked in {Path.cwd()})")
    elif not (path.is_file() or (config.source == "parquet" and path.is_dir())):
        raise ValueError(f"data.path={path} is not a file (looked in {Path.cwd()})")
    return path


def read_rows(config: DataConfig) -> Iterator[Row]:
    """Every row of data.path in file order; blank lines are skipped.

    ValueError if the file as a whole cannot be read.
    """
    if config.source == "function":
        yield from _function_rows(config.path)
        return
    path = data_path(config)
    if config.source == "jsonl":
        yield from _json_rows(path)
    elif config.source == "parquet":
        for file in parquet_files(path, config.hf_split):
            yield from _numbered(file, parquet_rows(file))
    else:
        for file in arrow_files(path, config.hf_split):
            yield from _numbered(file, arrow_rows(file))


def _function_rows(path: str | None) -> Iterator[Row]:
    """What the user's function gives. ValueError if it raises, or gives anything but rows."""
    if path is None:
        raise ValueError("data.source=function needs data.path=package.module.function")
    function = load_function("data.path", path)
    try:
        rows = list(function())
    except Exception as error:  # of the user's code, which raises what it likes
        raise ValueError(f"data.path={path} gave no rows: {told(error)}") from error
    for number, row in enumerate(rows, 1):
        fields: dict[str, Any] | BadRow = BadRow(f"a row is a dict of columns, not {type(row).__name__}")
        if isinstance(row, Mapping):
            unnamed = [name for name in row if not isinstance(name, str)]
            fields = BadRow(f"a column's name is text, not {unnamed[0]!r}") if unnamed else dict(row)
        yield Row(f"{path} row {number}", f"{path.rpartition('.')[2]}:{number}", fields)


def read_file(config: DataConfig) -> Iterator[Row]:
    """Every row of the file data.path, whose name says what it is: .parquet, .csv (packed or not), else JSON."""
    path = data_path(config)
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")]
    if suffixes[-1:] == [".parquet"]:
        yield from _numbered(path, parquet_rows(path))
    elif suffixes[-1:] == [".csv"]:
        with _opened(path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
            try:
                yield from _numbered(path, map(_table_row, csv.DictReader(text)))
            except (UnicodeDecodeError, csv.Error) as error:
                raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from error
    else:
        yield from _json_rows(path)


def _opened(path: Path) -> BinaryIO:
    """The file's bytes, unpacked, after a byte-order mark."""
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(GZIP):
        file = io.BufferedReader(gzip.open(path))
    elif head.startswith(ZSTD):
        import pyarrow as pa  # here, because only some runs read packed files

        file = io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    else:
        file = path.open("rb")
    try:
        if file.peek(len(MARK))[:len(MARK)] == MARK:
            file.read(len(MARK))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from error
    return file


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        with _opened(path) as file:
            if not (first := file.peek(1)[:1].strip()):  # white space, or nothing
                first = file.peek()[:4096].lstrip()[:1]
            yield from _json_list(path, file) if first == b"[" else _json_lines(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read to its end: {error}") from error


def _json_lines(path: Path, file: BinaryIO | io.BytesIO) -> Iterator[Row]:
    for number, raw in enumerate(file, start=1):
        if raw.strip():
            yield Row(f"{path}:{number}", f"{path.name}:{number}", _json_object(raw.rstrip(b"\r\n")))


def _json_list(path: Path, file: BinaryIO) -> Iterator[Row]:
    """The items of one list, or of lines if the first of them is a list."""
    raw = file.read()
    first = raw.lstrip().splitlines()[0]
    if _is_whole(first) and len(raw.strip()) > len(first):
        yield from _json_lines(path, io.BytesIO(raw))
        return
    try:
        text, place, number = raw.decode("utf-8"), 0, 0
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error
    decoder = json.JSONDecoder()
    place = _next_place(text, text.index("[") + 1)
    while number or text[place:place + 1] != "]":
        number += 1
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:  # where the item ends cannot be known
            raise ValueError(f"{path} row {number}: {_reason(error)}") from error
        yield Row(f"{path} row {number}", f"{path.name}:{number}", _object(value))
        place = _next_place(text, place)
        if text[place:place + 1] != ",":
            break
        place = _next_place(text, place + 1)
    if text[place:place + 1] != "]":
        what = "the list does not end" if place == len(text) else "no comma before it"
        raise ValueError(f"{path} row {number + 1}: not JSON ({what}, {_line(text, place)})")
    if (behind := _next_place(text, place + 1)) < len(text):
        raise ValueError(f"{path}: something follows the list, {_line(text, behind)}: a file has one list, or one "
                         "object a line")


def _line(text: str, place: int) -> str:
    return f"line {text.count(chr(10), 0, place) + 1}"


def _next_place(text: str, place: int) -> int:
    """The place of the next character that is no white space."""
    while place < len(text) and text[place] in " \n\r\t":
        place += 1
    return place


def _is_whole(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _json_object(raw: bytes) -> dict[str, Any] | BadRow:
    try:
        return _object(json.loads(raw.decode("utf-8")))
    except (ValueError, RecursionError) as error:
        return BadRow(_reason(error))


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    if isinstance(error, RecursionError):
        return "brackets in brackets, too deep to be read"
    return "a whole number of more than 4,300 digits, which Python does not read: write it as text"


def _object(value: Any) -> dict[str, Any] | BadRow:
    """The row, complete: everything in it can be written again."""
    if not isinstance(value, dict):
        return BadRow(f"a JSON {type(value).__name__}, not an object")
    for name, content in value.items():
        try:
            json.dumps([name, content], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return BadRow(f"column {name!a} has half of a surrogate pair ({error.object[error.start]!a})")
        except RecursionError:
            return BadRow(f"column {name!r}: brackets in brackets, too deep to be written")
    return value


def _table_row(fields: dict[Any, Any]) -> dict[str, Any] | str:
    """A row of a CSV file. With more cells than names every cell may stand in the wrong column."""
    more = fields.get(None)
    return fields if more is None else f"{len(more)} cell(s) more than the header has: text with a comma needs quotes"


def _numbered(path: Path, rows: Iterator[dict[str, Any] | str]) -> Iterator[Row]:
    for number, fields in enumerate(rows, start=1):
        yield Row(f"{path} row {number}", f"{path.name}:{number}",
                  BadRow(fields) if isinstance(fields, str) else fields)
