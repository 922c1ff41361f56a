"""Hugging Face folders: written whole or not at all, in shards, and read tensor by tensor.

No megatron here: the launcher writes and checks folders before any rank starts. Memory is bounded by one shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_rl.config.load import read_json
from megatron_rl.model.architectures import HF_FILES, family_of, parse_config
from megatron_rl.model.network import Network
from megatron_rl.model.slots import behind_prefixes, carried, expected_shapes, frozen_names, network_slots

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = ("F32", "BF16", "F16", "F64")
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer*", "tokenization_*.py", "vocab*", "*.model", "*.tiktoken", "tekken.json")
NOT_KEPT = ("config.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx",
            "*.npz", "*.index.json", "*.md", ".*", "training_args*", "trainer_state.json", "epoch.json")
"""Files of a source that an export leaves behind: weights, their index, and what tells of another training. All others
belong to how the model behaves: tokenizer, chat templates, generation_config.json, code that config.json names."""
TEMPLATES = "additional_chat_templates"
"""The one folder inside a Hugging Face folder: transformers keeps further chat templates there."""
DEFAULT_SHARD_BYTES = 2_000_000_000


def write_hf_folder(path: str | Path, config: dict[str, Any], tensors: Iterable[tuple[str, torch.Tensor]], *,
                    tokenizer_from: str | Path | None = None, carried_from: str | Path | None = None, mtp: bool = False,
                    max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> Path:
    """Write a loadable folder from a stream of named tensors, in any order; returns its path.

    Tensors (any device) are cast to config's torch_dtype. tokenizer_from: a Hugging Face folder whose tokenizer, chat
    templates, generation_config.json and other files are kept (NOT_KEPT names those that are not). carried_from: the
    Hugging Face folder whose layers behind the last are copied (slots.carried); they and buffers keep their dtype.
    mtp: the layer behind the last is among the tensors.
    `architectures` is set to what is written; `auto_map` names the code that lies in the new folder and no other. An
    existing folder stays as it is until the new one is complete. ValueError as check_export raises it, or when names or
    shapes are not those of `config`.
    """
    where = f"{path}/config.json"
    export = check_export(path, config, tokenizer_from, mtp=mtp)
    network, tensors = parse_config(config, where), _checked(tensors, export.shapes, str(path))
    kept = frozen_names(network, mtp=mtp)
    if carried_from is not None:
        reader = HFReader(carried_from)
        behind = carried(network, reader.names, mtp=mtp)
        tensors, kept = chain(tensors, ((name, reader.get(name)) for name in behind)), kept.union(behind)
    with atomic_folder(path, export.num_bytes) as folder:
        write_shards(folder, tensors, dtype=storage_dtype(config, where), kept=kept, max_shard_bytes=max_shard_bytes)
        for name, file in export.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
        (folder / "config.json").write_text(json.dumps(export.config, indent=2) + "\n", encoding="utf-8")
    return Path(path)


@dataclass(frozen=True)
class Export:
    """What a folder will hold: its config.json, tensor shapes, other files (name -> source), and its size."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Path]
    num_bytes: int


def check_export(path: str | Path, config: dict[str, Any], tokenizer_from: str | Path | None, *,
                 mtp: bool = False) -> Export:
    """Everything that write_hf_folder needs beside the tensors.

    ValueError names the key or the file: a config.json that cannot be read back, a dtype that cannot be stored, no
    tokenizer, a full disk, another thing in the place of the folder.
    """
    where = f"{path}/config.json"
    family = family_of(config, where)
    shapes = expected_shapes(parse_config(config, where), mtp=mtp)
    files = {name: HF_FILES / name for name in family.files}
    files |= {} if tokenizer_from is None else kept_files(tokenizer_from)
    auto_map = {**family.auto_map, **{
        auto: classes for auto, classes in (config.get("auto_map") or {}).items()
        if all(file in files for file in code_files({auto: classes}))}}
    config = {key: value for key, value in config.items() if key != "auto_map"}
    config |= {"architectures": [family.class_name]} | ({"auto_map": auto_map} if auto_map else {})
    num_bytes = sum(prod(shape) for shape in shapes.values()) * storage_dtype(config, where).itemsize
    num_bytes += sum(file.stat().st_size for file in files.values())
    check_place(Path(path).resolve(), num_bytes, str(path))
    return Export(config, shapes, files, num_bytes)


def kept_files(folder: str | Path) -> dict[str, Path]:
    """Name -> file of all that an export keeps of a Hugging Face folder. ValueError if no tokenizer is among them."""
    found = {file.name: file for file in sorted(Path(folder).iterdir())
             if file.is_file() and not any(file.match(pattern) for pattern in NOT_KEPT)}
    if not any(file.match(pattern) for file in found.values() for pattern in TOKENIZER_FILES):
        raise ValueError(f"{folder}: no tokenizer files there (tokenizer.json, tokenizer_config.json, ...)")
    return found | {f"{TEMPLATES}/{file.name}": file for file in sorted((Path(folder) / TEMPLATES).glob("*.jinja"))}


def code_files(auto_map: Mapping[str, Any]) -> list[str]:
    """The files that an auto_map names: "module.Class", a list of them, or "repository--module.Class"."""
    classes = [name for value in auto_map.values() for name in (value if isinstance(value, list) else [value]) if name]
    return [f"{name.rpartition('.')[0]}.py" for name in classes]


def refuse_code(folder: str | Path, *, trusted: bool, key: str = "model.path") -> None:
    """ValueError naming the file when loading the Hugging Face folder would run code of its own.

    The configuration file that exports carry is the project's own and passes. trusted: model.trust_remote_code.
    """
    for config in () if trusted else sorted(Path(folder).glob("*config*.json")):
        raw = read_json(config)
        for name in code_files(raw.get("auto_map") or {} if isinstance(raw, dict) else {}):
            file, ours = Path(folder) / name, HF_FILES / name
            if not (ours.is_file() and file.is_file() and file.read_bytes() == ours.read_bytes()):
                raise ValueError(f"{key}={folder}: auto_map of {config.name} names {name}, code that engine and "
                                 "tokenizer would run: read it, then set model.trust_remote_code=true")


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
                 kept: Container[str] = (), max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    """model.safetensors, or shards of at most max_shard_bytes (a larger tensor: one of its own) and their index.

    kept: names of the tensors that are not cast to `dtype`.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    held_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal held_bytes
        file = folder / f"part-{len(shards)}.safetensors"
        save_tensors(held, file)
        shards.append(list(held))
        held.clear()
        held_bytes = 0

    for name, tensor in tensors:
        stored = tensor.dtype if name in kept else dtype
        num_bytes = tensor.numel() * stored.itemsize
        if held and held_bytes + num_bytes > max_shard_bytes:
            flush()
        # A copy: the caller may reuse the buffer, and safetensors refuses tensors that share storage.
        held[name] = tensor.detach().to("cpu", stored, copy=True).contiguous()
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


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write a *.safetensors file that the folder's readers may read: safetensors 0.8 writes 0600."""
    save_file(dict(tensors), file, metadata={"format": "pt"})
    file.chmod(file.parent.stat().st_mode & 0o666)


@contextmanager
def atomic_folder(path: str | Path, num_bytes: int, *, mark: str = "config.json") -> Iterator[Path]:
    """A new empty folder beside `path` to fill; on success it becomes `path`, on any error it is removed.

    num_bytes: what the caller means to write; ValueError if the disk has less. An existing `path` is replaced
    only if it is empty or such a folder (`mark` is in it, no subfolders but TEMPLATES). Files are synced before the
    rename. Replacing takes two renames; a machine that dies between them leaves the old folder as
    `.NAME.XXXXXXXX.old` beside it.
    """
    final = Path(path).resolve()
    check_place(final, num_bytes, str(path), mark)
    final.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{final.name}.{uuid4().hex[:8]}"
    partial, old = final.parent / f"{stem}.partial", final.parent / f"{stem}.old"
    partial.mkdir()
    try:
        yield partial
        for entry in chain(partial.rglob("*"), (partial,)):
            _sync(entry)
        _check_replaceable(final, mark)
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


def check_place(path: Path, num_bytes: int, shown: str, mark: str = "config.json") -> None:
    """ValueError when something else lies at `path`, or when its disk has no room for num_bytes."""
    _check_replaceable(path, mark)
    there = next(parent for parent in path.parents if parent.exists())
    if not there.is_dir():
        raise ValueError(f"{shown}: {there} is a file, not a folder")
    free, margin = shutil.disk_usage(there).free, 16 * 2**20
    if free < num_bytes + margin:
        raise ValueError(f"{shown}: writing it needs {num_bytes + margin:,} bytes; {free:,} are free on that disk")


def _check_replaceable(path: Path, mark: str) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file, not a folder")
    entries = list(path.iterdir())
    if entries and not (path / mark).is_file():
        kind = "Hugging Face folder" if mark == "config.json" else "adapter folder"
        raise ValueError(f"{path}: not replaced, because it is no {kind} (no {mark} in it)")
    folders = [entry.name for entry in entries if entry.is_dir() and entry.name != TEMPLATES]
    if folders:
        raise ValueError(f"{path}: not replaced, because it also holds the folder {folders[0]}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_tensors(file: Path):
    """The *.safetensors file, to be read tensor by tensor. ValueError if it is damaged."""
    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}): copy or convert the checkpoint again") from error


class HFReader:
    """Tensors of a Hugging Face folder, which `key` named, by name; read lazily from its *.safetensors files.

    As the engine reads it: with an index the files that the index names, without one all of them.
    ValueError names a file that is missing or damaged, and a tensor that is stored twice.
    """

    def __init__(self, folder: str | Path, key: str = "model.path"):
        self.named = f"{key}={folder}"
        self._where: dict[str, Any] = {}
        files: dict[str, Path] = {}
        for file in self.files(Path(folder), key):
            handle = open_tensors(file)
            for name in handle.keys():
                if name in files:
                    raise ValueError(f"{self.named}: {name} is stored twice, in {files[name].name} and in {file.name}: "
                                     "remove the file that is left over")
                files[name], self._where[name] = file, handle

    @staticmethod
    def files(folder: Path, key: str = "model.path") -> list[Path]:
        """Those that hold its tensors."""
        index = folder / INDEX
        if not index.is_file():
            files = sorted(folder.glob("*.safetensors"))
        else:
            raw = read_json(index)
            named = raw.get("weight_map") if isinstance(raw, dict) else None
            if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
                raise ValueError(f"{index}: it has no weight_map of tensor names to files: copy the checkpoint again")
            files = [folder / name for name in sorted(set(named.values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ValueError(f"{key}={folder}: {INDEX} names {', '.join(missing[:3])}, which is not there: copy "
                                 "the checkpoint again")
        if not files:
            raise ValueError(f"{key}={folder}: no *.safetensors file there")
        return files

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors calls it: F32, BF16, ..."""
        return self._where[name].get_slice(name).get_dtype()

    def get(self, name: str) -> torch.Tensor:
        return self._where[name].get_tensor(name)


def check_checkpoint(config: Network, reader: HFReader, *, mtp: bool = False) -> None:
    """Raise ValueError listing the names, shapes and dtypes in which the folder departs from its config.json.

    Three kinds of tensors may be there and are not read: the frequencies of the rotation, which config.json fixes, a
    tied head that equals its embedding, and layers behind the last (slots.carried) unless model.mtp trains one.
    """
    expected = expected_shapes(config, mtp=mtp)
    trained = behind_prefixes(config) if mtp else ()
    problems = [f"missing {name} {list(shape)}" + ", which model.mtp=true trains" * name.startswith(trained)
                for name, shape in expected.items() if name not in reader.names]
    more = {name for name in reader.names - set(expected) if not name.endswith("rotary_emb.inv_freq")}
    more -= set(carried(config, more))
    if config.tie_word_embeddings and "lm_head.weight" in more:
        more -= {"lm_head.weight"}
        embedding = network_slots(config)["embedding.word_embeddings.weight"].key
        if embedding in reader.names and not torch.equal(reader.get("lm_head.weight"), reader.get(embedding)):
            problems.append(f"lm_head.weight differs from {embedding}, and config.json says tie_word_embeddings=true")
    problems += [f"unexpected {name}" for name in sorted(more)]
    problems += [f"{name} is stored as {reader.dtype(name)}; only {', '.join(STORED_DTYPES)} are supported"
                 for name in expected if name in reader.names and reader.dtype(name) not in STORED_DTYPES]
    problems += [f"{name} has shape {list(reader.shape(name))}, config.json says {list(shape)}"
                 for name, shape in expected.items() if name in reader.names and reader.shape(name) != shape]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{reader.named}: the checkpoint does not match its config.json:\n  {shown}")
