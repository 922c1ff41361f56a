"""Parquet files and Arrow streams, and which of a folder's files belong to a split."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_rl.config.data import DataConfig

__all__ = ["arrow_files", "arrow_rows", "parquet_files", "parquet_rows"]

ONLY_SPLIT = DataConfig.hf_split
"""data.hf_split as nobody set it: a folder without splits has this one."""
_SHARD = re.compile(r"(.+?)-\d+-of-\d+(?:-[0-9a-f]+)?$")
_SPLIT_NAMES = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation",
                "heldout", "held_out")


def parquet_files(path: Path, split: str) -> list[Path]:
    """`path`, or the files of `split` below it, in the Hub's layout: train-00000-of-00002, test.parquet, test/.

    ValueError if the folder holds several splits but none of that name, or files of no split beside them.
    """
    if path.is_file():
        _refuse_split(path, split)
        return [path]
    files = sorted(file for file in path.rglob("*.parquet") if not any(
        part.startswith(".") for part in file.relative_to(path).parts))
    owners = {file: _split_of(file.relative_to(path)) for file in files}
    names = sorted({name for name in owners.values() if name is not None})
    if not names:
        _refuse_split(path, split)
    if not names or (len(names) == 1 and split == ONLY_SPLIT):
        return files
    if stray := [file.name for file, name in owners.items() if name is None]:
        raise ValueError(f"data.path={path} holds the splits {', '.join(names)}, and {', '.join(stray[:3])}, whose "
                         "names say no split: name one file, or move them apart")
    if split not in names:
        raise ValueError(f"data.hf_split={split}: {path} has the splits {', '.join(names)}")
    return [file for file in files if owners[file] == split]


def _split_of(file: Path) -> str | None:
    """The split that the name of the file, or of a folder above it, says."""
    stem = file.name.removesuffix(".parquet").lower()
    if (shard := _SHARD.match(stem)) and shard[1] not in ("data", "part"):
        return shard[1]
    for name in (stem, *(part.lower() for part in reversed(file.parent.parts))):
        for part in (name, re.split(r"[-_.\d]", name)[0]):
            if part in _SPLIT_NAMES:
                return part
    return None


def _refuse_split(path: Path, split: str) -> None:
    if split != ONLY_SPLIT:
        raise ValueError(f"data.hf_split={split}: {path} has no splits to choose from; leave it out")


def parquet_rows(path: Path) -> Iterator[dict[str, Any] | str]:
    """Each row, or the reason why it cannot be read. ValueError if the file cannot be read."""
    from pyarrow import ArrowException, parquet  # here, because only some runs read tables

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from _rows(batch)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error


def arrow_rows(path: Path) -> Iterator[dict[str, Any] | str]:
    """Like parquet_rows, for a file of Dataset.save_to_disk."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                yield from _rows(batch)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not an Arrow stream: {error}") from error


def _rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # nothing was yielded: the list is made as a whole
        for place in range(batch.num_rows):
            try:
                yield batch.slice(place, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield f"not UTF-8 ({error.reason} at byte {error.start} of a text)"


def arrow_files(folder: Path, split: str) -> list[Path]:
    """The files of a saved Dataset, or of one split of a saved DatasetDict (datasets/arrow_dataset.py save_to_disk)."""
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = _said_by(splits, lambda said: [str(name) for name in said["splits"]])
        if split not in names:
            raise ValueError(f"data.hf_split={split}: {folder} has the splits {', '.join(names)}")
        folder = folder / split
    else:
        _refuse_split(folder, split)
    state = folder / "state.json"
    if not state.is_file():
        raise ValueError(f"{folder} has no state.json: not a folder that Dataset.save_to_disk wrote")
    return _said_by(state, lambda said: [folder / entry["filename"] for entry in said["_data_files"]])


def _said_by(path: Path, pick: Callable[[Any], list[Any]]) -> list[Any]:
    """What a JSON file of Dataset.save_to_disk says."""
    try:
        return pick(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not as Dataset.save_to_disk writes it: {type(error).__name__}: {error}") from error
