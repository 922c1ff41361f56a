"""Hugging Face folders: written whole or not at all, in shards, and read tensor by tensor.

No megatron here: the launcher writes and checks folders before any rank starts. Memory is bounded by one shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_rl.model.architectures import HF_FILES, architecture_of, parse_config
from megatron_rl.model.network import Network
from megatron_rl.model.slots import expected_shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "tokenization_*.py",
)
DEFAULT_SHARD_BYTES = 2_000_000_000


def write_hf_folder(path: str | Path, config: dict[str, Any], tensors: Iterable[tuple[str, torch.Tensor]], *,
                    tokenizer_from: str | Path | None = None, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> Path:
    """Write a loadable folder from a stream of named tensors, in any order; returns its path.

    Tensors (any device) are cast to config's torch_dtype. `architectures` and `auto_map` are set to what is
    written here. An existing folder stays as it is until the new one is complete. ValueError when names or
    shapes are not those of `config`, when the disk is too full, or when `path` holds something else.
    """
    where = f"{path}/config.json"
    architecture = architecture_of(config, where)
    config = {key: value for key, value in config.items() if key != "auto_map"} | architecture.identity
    model, dtype = parse_config(config, where), storage_dtype(config, where)
    shapes = expected_shapes(model)
    files = [*(HF_FILES / name for name in architecture.files),
             *(tokenizer_files(tokenizer_from) if tokenizer_from is not None else ())]
    weight_bytes = sum(prod(shape) for shape in shapes.values()) * dtype.itemsize
    with atomic_folder(path, weight_bytes + sum(file.stat().st_size for file in files)) as folder:
        write_shards(folder, _checked(tensors, shapes, str(path)), dtype=dtype, max_shard_bytes=max_shard_bytes)
        for file in files:
            shutil.copyfile(file, folder / file.name)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(path)


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The tokenizer's files in a Hugging Face folder; ValueError if there are none."""
    found = [file for pattern in TOKENIZER_FILES for file in sorted(Path(folder).glob(pattern))]
    if not found:
        raise ValueError(f"{folder}: no tokenizer files there (tokenizer.json, tokenizer_config.json, ...)")
    return found


def storage_dtype(config: dict[str, Any], where: str) -> torch.dtype:
    """The dtype that a config.json gives the checkpoint's tensors; ValueError names the key."""
    name = config.get("torch_dtype", config.get("dtype"))
    if name not in DTYPES:
        raise ValueError(f"{where}: torch_dtype={name!r} must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _checked(tensors: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, tuple[int, ...]],
             where: str) -> Iterator[tuple[str, torch.Tensor]]:
    missing = dict(shapes)
    for name, tensor in tensors:
        if name not in missing:
            raise ValueError(f"{where}: {'second' if name in shapes else 'unexpected'} tensor {name}")
        if tuple(tensor.shape) != missing.pop(name):
            raise ValueError(f"{where}: {name} has shape {list(tensor.shape)}, config.json says {list(shapes[name])}")
        yield name, tensor
    if missing:
        raise ValueError(f"{where}: {len(missing)} tensors missing, first {next(iter(missing))}")


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, dtype: torch.dtype,
                 max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    """model.safetensors, or shards of at most max_shard_bytes (a larger tensor: one of its own) and their index."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    held_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal held_bytes
        file = folder / f"part-{len(shards)}.safetensors"
        save_file(held, file, metadata={"format": "pt"})
        file.chmod(folder.stat().st_mode & 0o666)  # safetensors 0.8 writes 0600
        shards.append(list(held))
        held.clear()
        held_bytes = 0

    for name, tensor in tensors:
        num_bytes = tensor.numel() * dtype.itemsize
        if held and held_bytes + num_bytes > max_shard_bytes:
            flush()
        # A copy: the caller may reuse the buffer, and safetensors refuses tensors that share storage.
        held[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        held_bytes += num_bytes
        total_bytes += num_bytes
    flush()
    if len(shards) == 1:
        os.rename(folder / "part-0.safetensors", folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"part-{number}.safetensors", folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def atomic_folder(path: str | Path, num_bytes: int) -> Iterator[Path]:
    """A new empty folder beside `path` to fill; on success it becomes `path`, on any error it is removed.

    num_bytes: what the caller means to write; ValueError if the disk has less. An existing `path` is replaced
    only if it is empty or a Hugging Face folder (config.json, no subfolders). Files are synced before the
    rename. Replacing takes two renames; a machine that dies between them leaves the old folder as
    `.NAME.XXXXXXXX.old` beside it.
    """
    final = Path(path).resolve()
    _check_replaceable(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(final.parent).free
    margin = 16 * 2**20
    if free < num_bytes + margin:
        raise ValueError(f"{path}: writing it needs {num_bytes + margin:,} bytes; {free:,} are free on that disk")
    mark = f".{final.name}.{uuid4().hex[:8]}"
    partial, old = final.parent / f"{mark}.partial", final.parent / f"{mark}.old"
    partial.mkdir()
    try:
        yield partial
        for entry in chain(partial.iterdir(), (partial,)):
            _sync(entry)
        _check_replaceable(final)
        replaces = final.exists()
        if replaces:
            os.rename(final, old)
        try:
            os.rename(partial, final)
        except OSError:
            if replaces:
                os.rename(old, final)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file, not a folder")
    entries = list(path.iterdir())
    if entries and not (path / "config.json").is_file():
        raise ValueError(f"{path}: not replaced, because it is no Hugging Face folder (no config.json in it)")
    folders = [entry.name for entry in entries if entry.is_dir()]
    if folders:
        raise ValueError(f"{path}: not replaced, because it also holds the folder {folders[0]}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(file: Path):
    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}): copy or convert the checkpoint again") from error


class HFReader:
    """Tensors of a Hugging Face folder, which `key` named, by name; read lazily from its *.safetensors files."""

    def __init__(self, folder: str | Path, key: str = "model.path"):
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise ValueError(f"{key}={folder}: no *.safetensors file there")
        self._handles = [_open(file) for file in files]
        self._where = {name: handle for handle in self._handles for name in handle.keys()}
        self.named = f"{key}={folder}"

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def get(self, name: str) -> torch.Tensor:
        return self._where[name].get_tensor(name)


def check_checkpoint(config: Network, reader: HFReader, superfluous: Set[str] = frozenset()) -> None:
    """Raise ValueError listing the names and shapes in which the folder departs from its config.json.

    superfluous: names that may be there and are not read.
    """
    expected = expected_shapes(config)
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in reader.names]
    problems += [f"unexpected {name}" for name in sorted(reader.names - set(expected) - superfluous)]
    problems += [f"{name} has shape {list(reader.shape(name))}, config.json says {list(shape)}"
                 for name, shape in expected.items() if name in reader.names and reader.shape(name) != shape]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{reader.named}: the checkpoint does not match its config.json:\n  {shown}")
