"""Checkpoint folders as files: which there are, which is meant, whether one is whole. No rank is needed for this.

<run>/checkpoints/step_00000020/ is written as step_00000020.partial and renamed when all of it is on the disk; its
manifest.json, written after them, holds the size and the sha256 of every other file, and manifest.sha256 that of
manifest.json: no byte of a checkpoint can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, BinaryIO

from megatron_rl.config.schema import RunConfig
from megatron_rl.model.adapter_folder import check_identity
from megatron_rl.model.network import FREE_KEYS, Network
from megatron_rl.model.rope import RopeScaling

FORMAT = 3
MANIFEST, SUM, LOOP = "manifest.json", "manifest.sha256", "loop.json"
ORCHESTRATOR_STATE = "orchestrator.safetensors"
_NAME = re.compile(r"^step_(\d{8})$")
_CHUNK = 1 << 24
# of what a network could not have when a checkpoint was written
_DEFAULTS = {each.name: each.default for each in fields(Network) if each.default is not MISSING} | {
    "rope": asdict(RopeScaling())}


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing, cut short or changed; the message names it."""


class Writer:
    """A file under construction that counts and hashes what is written to it."""

    def __init__(self, file: BinaryIO):
        self._file, self.num_bytes, self._sha256 = file, 0, hashlib.sha256()

    def write(self, data) -> int:
        self._file.write(data)
        self._sha256.update(data)
        self.num_bytes += len(data)
        return len(data)

    @property
    def entry(self) -> dict[str, Any]:
        """Its line in the manifest."""
        return {"bytes": self.num_bytes, "sha256": self._sha256.hexdigest()}


@contextmanager
def writing(path: Path):
    """A Writer on the new file `path`, on the disk when the block ends. OSError names the file."""
    try:
        with path.open("wb") as file:
            yield Writer(file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def folder(run: RunConfig) -> Path:
    return Path(run.dir) / "checkpoints"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(_NAME.match(checkpoint.name)[1])


def saved_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint of a finished save, oldest first."""
    return sorted(int(match[1]) for path in folder.glob("step_*") if (match := _NAME.match(path.name)))


def choose(run: RunConfig) -> Path | None:
    """The checkpoint from which a run goes on, or None to begin at the start. ValueError names the key to change."""
    where = folder(run)
    steps = saved_steps(where)
    if not run.resume:
        if steps:
            raise ValueError(f"{where} holds checkpoints of an earlier run: continue it with resume=true, or choose "
                             "another run.dir")
        return None
    if run.resume_from is None:
        return where / step_name(steps[-1]) if steps else None
    if run.resume_from not in map(step_name, steps):
        raise ValueError(f"run.resume_from={run.resume_from}: {where} holds "
                         f"{', '.join(map(step_name, steps)) or 'no checkpoint'}")
    return where / run.resume_from


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest, its own sum, and every file's presence and size checked. DamagedCheckpoint names the file that is
    not right."""
    path = checkpoint / MANIFEST
    for needed in (path, checkpoint / SUM):
        if not needed.is_file():
            raise DamagedCheckpoint(f"{needed} is missing")
    content = path.read_bytes()
    if (checkpoint / SUM).read_bytes() != _sum_of(content):
        raise DamagedCheckpoint(f"{path} or {SUM} beside it has changed since it was written (sha256 differs)")
    manifest = json.loads(content)
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path}: format {manifest['format']}, this version reads format {FORMAT}")
    for name, entry in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise DamagedCheckpoint(f"{file} has {file.stat().st_size:,} bytes, {entry['bytes']:,} were written")
    return manifest


def check_sums(checkpoint: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    """Read the files `names` and compare their sha256. DamagedCheckpoint names the first that differs."""
    for name in names:
        digest = hashlib.sha256()
        with (checkpoint / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != manifest["files"][name]["sha256"]:
            raise DamagedCheckpoint(f"{checkpoint / name} has changed since it was written (sha256 differs)")


def read_loop_state(checkpoint: Path) -> dict[str, Any]:
    """loop.json, whole. ValueError with how to go on if it is damaged."""
    return json.loads(read_whole(checkpoint, LOOP))


def read_whole(checkpoint: Path, name: str) -> bytes:
    """One small file. ValueError with how to go on if it is damaged."""
    try:
        manifest = read_manifest(checkpoint)
        if name not in manifest["files"]:
            raise ValueError(f"{checkpoint} holds no {name}: a run of another kind has saved it")
        check_sums(checkpoint, manifest, [name])
    except ValueError as error:
        raise explained(error, checkpoint) from None
    return (checkpoint / name).read_bytes()


def _sum_of(manifest: bytes) -> bytes:
    """The content of manifest.sha256, as `sha256sum -c` reads it."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def check_model(checkpoint: Path, manifest: Mapping[str, Any], model: Mapping[str, Any],
                adapters: Mapping[str, Any] | None = None, *, mtp: bool = False) -> None:
    """ValueError naming the keys of config.json in which the checkpoint's network is not `model`, those of model.lora
    in which it has other adapters than `adapters` (adapter_folder.identity), or model.mtp if only one has the layer.
    """
    saved, model = {**_DEFAULTS, **manifest["model"]}, {**_DEFAULTS, **model}
    if (factor := saved.pop("rope_factor", 1.0)) != 1.0:  # how rope was called first
        saved["rope"] = asdict(RopeScaling("linear", factor))
    keys = sorted((saved.keys() | model.keys()) - FREE_KEYS)
    differing = [f"{key} is {saved.get(key)} there and {model.get(key)} here" for key in keys
                 if saved.get(key) != model.get(key)]
    if differing:
        raise ValueError(f"{checkpoint} is a checkpoint of another model than model.path: {'; '.join(differing)}; "
                         "give its model.path, or choose another run.dir")
    check_identity(str(checkpoint), manifest.get("adapters"), adapters)
    saved_mtp = manifest.get("mtp", False)
    if saved_mtp != mtp:
        raise ValueError(f"model.mtp={str(mtp).lower()}, and {checkpoint} holds {'a' if saved_mtp else 'no'} trained "
                         f"layer behind the last: set model.mtp={str(saved_mtp).lower()}")


def advice(damaged: Path) -> str:
    """How to go on when `damaged` is: names the newest checkpoint before it of which every byte is right."""
    for step in reversed(saved_steps(damaged.parent)):
        other = damaged.parent / step_name(step)
        if other.name >= damaged.name:
            continue
        try:
            manifest = read_manifest(other)
            check_sums(other, manifest, manifest["files"])
        except ValueError:
            continue
        return f"the last good checkpoint is {other.name}: go on from it with resume=true run.resume_from={other.name}"
    return "no earlier checkpoint is whole: begin again in another run.dir"


def explained(error: ValueError, checkpoint: Path) -> ValueError:
    """`error` of reading `checkpoint`, with how to go on if it is damage."""
    if not isinstance(error, DamagedCheckpoint):
        return error
    return DamagedCheckpoint(f"damaged checkpoint: {error}; {advice(checkpoint)}")


def check_resume(run: RunConfig, model: Mapping[str, Any], adapters: Mapping[str, Any] | None = None, *,
                 mtp: bool = False) -> None:
    """What can be said of run.resume before ranks start: sizes of files, network and adapters, not yet checksums."""
    checkpoint = choose(run)
    if checkpoint is None:
        return
    try:
        check_model(checkpoint, read_manifest(checkpoint), model, adapters, mtp=mtp)
    except ValueError as error:
        raise explained(error, checkpoint) from None


def commit(partial: Path, final: Path, manifest: Mapping[str, Any], *, keep: int,
           allowed: Callable[[], None] = lambda: None) -> None:
    """Make the written folder `partial` the checkpoint `final`; then only the newest `keep` stay.

    allowed: called first, and right before each rename, when nothing waits for a disk any more; what it raises leaves
    the rest undone.
    """
    allowed()
    content = json.dumps(manifest).encode()
    for name, data in ((MANIFEST, content), (SUM, _sum_of(content))):
        with writing(partial / name) as file:
            file.write(data)
    sync(partial)
    allowed()
    if final.exists():
        set_aside(final)
    os.rename(partial, final)
    sync(final.parent)
    for step in saved_steps(final.parent)[:-keep]:
        old = final.parent / step_name(step)
        dropped = old.with_suffix(".dropped")  # half a folder must never bear the name of a whole one
        allowed()
        os.rename(old, dropped)
        shutil.rmtree(dropped, ignore_errors=True)  # what stays, the next clean() takes


def clean(folder: Path) -> None:
    """Remove what a killed save left behind."""
    for path in (*folder.glob("step_*.partial"), *folder.glob("step_*.dropped")):
        shutil.rmtree(path, ignore_errors=path.suffix == ".dropped")


def set_aside(checkpoint: Path) -> None:
    """Rename a checkpoint so that no run takes it, and nothing of it is lost."""
    number = 1
    while (target := checkpoint.with_suffix(f".aside{number}")).exists():
        number += 1
    os.rename(checkpoint, target)


def set_aside_after(checkpoint: Path) -> None:
    """The checkpoints newer than `checkpoint`, from which a run goes on."""
    for step in saved_steps(checkpoint.parent):
        if step_name(step) > checkpoint.name:
            set_aside(checkpoint.parent / step_name(step))


def sync(folder: Path) -> None:
    """Put a folder's entries on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
