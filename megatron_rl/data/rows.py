"""Rows of the files that problems come in: JSON lines, Parquet, and what Hugging Face `datasets` writes to a disk."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.load import read_json
from megatron_rl.config.schema import DataConfig

__all__ = ["FILE_SOURCES", "BadRow", "Row", "data_path", "read_file", "read_rows"]

FILE_SOURCES = ("jsonl", "parquet", "hf_dataset")


class BadRow(ValueError):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class Row:
    """One row and its place: `where` for messages (path:12, or path row 12), `name` for ids (file:12). Counted from 1.

    fields: column -> value, or the reason why there are none.
    """

    where: str
    name: str
    fields: dict[str, Any] | BadRow


def data_path(config: DataConfig) -> Path:
    """data.path, which must be there: a file for jsonl, a folder for hf_dataset, either for parquet."""
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
    """Every row of data.path in file order; blank lines are skipped. ValueError when the whole cannot be read."""
    path = data_path(config)
    if config.source == "jsonl":
        yield from _json_lines(path)
    elif config.source == "parquet":
        for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
            yield from _numbered(file, _parquet_rows(file))
    else:
        for file in _arrow_files(path, config.hf_split):
            yield from _numbered(file, _arrow_rows(file))


def read_file(config: DataConfig) -> Iterator[Row]:
    """Every row of the file data.path, whose name says what it is: .parquet, .csv, .json (a list), else JSON lines."""
    path = data_path(config)
    if path.suffix == ".parquet":
        yield from _numbered(path, _parquet_rows(path))
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            yield from _numbered(path, csv.DictReader(file))
    elif path.suffix == ".json" and path.read_text(encoding="utf-8").lstrip().startswith("["):
        yield from _numbered(path, iter(read_json(path)))
    else:
        yield from _json_lines(path)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield Row(f"{path}:{number}", f"{path.name}:{number}", _json_object(raw.rstrip(b"\r\n")))


def _json_object(raw: bytes) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 ({error.reason} at byte {error.start})")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON ({error.msg} at column {error.colno})")
    return row if isinstance(row, dict) else BadRow(f"a JSON {type(row).__name__}, not an object")


def _numbered(path: Path, rows: Iterator[dict[str, Any]]) -> Iterator[Row]:
    for number, fields in enumerate(rows, start=1):
        yield Row(f"{path} row {number}", f"{path.name}:{number}", fields)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowInvalid, parquet  # here, because only some runs read tables

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error


def _arrow_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise ValueError(f"{path} is not an Arrow stream: {error}") from error


def _arrow_files(folder: Path, split: str | None) -> list[Path]:
    """The files of a saved Dataset, or of one split of a saved DatasetDict (datasets/arrow_dataset.py save_to_disk)."""
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text())["splits"]
        if split not in names:
            raise ValueError(f"data.hf_split={split}: {folder} has the splits {', '.join(names)}")
        folder = folder / split
    state = folder / "state.json"
    if not state.is_file():
        raise ValueError(f"{folder} has no state.json: not a folder that Dataset.save_to_disk wrote")
    return [folder / entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
