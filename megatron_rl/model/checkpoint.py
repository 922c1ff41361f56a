"""Checkpoints of a run in training: saved whole or not at all, in the background if asked, resumed in any layout.

<run.dir>/checkpoints/step_00000020/
    manifest.json            step, layout, network, where each element is, size and sha256 of the files below
    manifest.sha256          the sum of manifest.json
    buffers.safetensors      the experts' biases under their Hugging Face names, fp32, if the network has some
    rank_00000.safetensors   what rank 0 holds: "weight/KEY/PIECE", "exp_avg/...", "exp_avg_sq/...", flat fp32 ranges
    random.pt                random states of all ranks
    loop.json                where the loop stands
    orchestrator.safetensors the orchestrator's state (orchestrator/state.py); SFT has none

KEY is the parameter's first Hugging Face name (slots.Slot), PIECE its number in the tensor- or expert-tensor-parallel
cut. Each rank writes what its optimiser holds and reads what its own layout needs, cut anew through the Slot where the
layouts differ; nothing is gathered. The weights are the fp32 master weights: those of a bf16 model are their casts.
With model.lora they are the adapters alone, and the manifest names the base that they stand beside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from safetensors.torch import load_file, save

from megatron_rl.config.schema import RunConfig
from megatron_rl.model import checkpoint_files as files
from megatron_rl.model.adam_state import KINDS, adam_shards, set_step_count, step_count
from megatron_rl.model.adapter_folder import identity
from megatron_rl.model.build import Policy
from megatron_rl.model.checkpoint_shards import Held, ShardReader, file_name, locate, tensor_name, write_tensors
from megatron_rl.model.convert import frozen_slots, trained_slots
from megatron_rl.model.slots import Slot
from megatron_rl.observe import lease
from megatron_rl.topology import Topology

BUFFERS = "buffers.safetensors"
ORCHESTRATOR_STATE = files.ORCHESTRATOR_STATE


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A save whose files are being written: `written` becomes this rank's lines of the manifest."""

    step: int
    manifest: dict[str, Any]
    written: Future


class Checkpoints:
    """Saves and restores one run's state; every rank calls every method."""

    def __init__(self, run: RunConfig, policy: Policy, optimizer, topology: Topology):
        self.folder = files.folder(run)
        self._run, self._policy, self._optimizer, self._topology = run, policy, optimizer, topology
        self._slots = trained_slots(policy, topology)
        self._buffers = frozen_slots(policy) if policy.adapters is None else []
        self._adapters = topology.broadcast_object(identity(policy.lora, policy.path) if topology.is_main else None)
        self._shards = adam_shards(optimizer, [parameter for _, parameter in self._slots])
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None

    # ---- saving ------------------------------------------------------------------------------------------

    def save(self, step: int, loop_state: dict[str, Any], others: Mapping[str, bytes] | None = None) -> None:
        """Save the state after `step` steps. With run.async_save this returns when the state is copied to the host.

        loop_state: JSON values. others: files by name. Those of rank 0 are kept. OSError on every rank, naming rank
        and file, when something cannot be written: the earlier checkpoints stay as they are.
        """
        self.finish()
        partial = self._partial(step)
        self._on_main(step, lambda: self._make_folder(partial))
        manifest, contents = self._manifest(step), self._small_files({"step": step, **loop_state}, others or {})
        tensors = self._tensors()
        if self._run.async_save:
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self._pending = _Pending(step, manifest, self._thread.submit(self._write, partial, tensors, contents))
        if not self._run.async_save:
            self.finish()

    def poll(self) -> None:
        """Make a background save the newest checkpoint if every rank has written its part. OSError as in `save`."""
        if self._pending is not None and all(self._topology.gather_objects(self._pending.written.done())):
            self.finish()

    def finish(self) -> None:
        """Wait for a save that is under way and make it the newest checkpoint. OSError as in `save`."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self._agree(pending.step, pending.written.exception())
        for part in self._topology.gather_objects(pending.written.result()):
            pending.manifest["files"] |= part
        self._on_main(pending.step, lambda: self._commit(pending))

    def _commit(self, pending: _Pending) -> None:
        files.commit(self._partial(pending.step), self.folder / files.step_name(pending.step), pending.manifest,
                     keep=self._run.keep_checkpoints, allowed=lambda: lease.check(self._run.dir))

    def _partial(self, step: int) -> Path:
        return self.folder / f"{files.step_name(step)}.partial"

    def _make_folder(self, partial: Path) -> None:
        if not self.folder.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "run.dir was removed", str(self.folder.parent))
        lease.check(self._run.dir)
        files.clean(self.folder)
        self.folder.mkdir(exist_ok=True)
        partial.mkdir()  # without parents: a run.dir that is removed meanwhile stays removed

    def _manifest(self, step: int) -> dict[str, Any]:
        gather = self._topology.gather_objects
        held = [self._held(slot, parameter) for slot, parameter in self._slots if self._saves(slot, parameter)]
        return {"format": files.FORMAT, "step": step, "optimizer_steps": max(gather(step_count(self._optimizer))),
                "layout": self._layout(), "model": dataclasses.asdict(self._policy.config), "adapters": self._adapters,
                "mtp": self._policy.mtp is not None,
                "parameters": locate(gather(held)), "files": {}}

    def _small_files(self, loop_state: dict[str, Any], others: Mapping[str, bytes]) -> dict[str, bytes]:
        """Files that rank 0 writes beside its tensors; made now, because training goes on."""
        states = self._topology.gather_objects(_random_state())
        buffers = self._topology.gather_objects(
            {slot.key: buffer.to("cpu", copy=True) for slot, buffer in self._buffers})
        if not self._topology.is_main:
            return {}
        whole = {name: buffer for part in buffers for name, buffer in part.items()}
        return {"random.pt": _pickled(states), "loop.json": json.dumps(loop_state).encode(), **others,
                **({BUFFERS: save(whole)} if whole else {})}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Name -> flat fp32 tensor of all that this rank saves, not copied."""
        return {tensor_name(kind, slot.key, self._place(slot)[0]): tensor
                for slot, parameter in self._slots if self._saves(slot, parameter)
                for kind, tensor in self._shards[parameter].tensors().items()}

    def _write(self, partial: Path, tensors: Mapping[str, torch.Tensor],
               contents: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
        """This rank's files, on the disk when this returns; their lines of the manifest."""
        entries = {}
        name = file_name(self._topology.rank)
        with files.writing(partial / name) as file:
            write_tensors(file, tensors)
        entries[name] = file.entry
        for name, content in contents.items():
            with files.writing(partial / name) as file:
                file.write(content)
            entries[name] = file.entry
        return entries

    def _on_main(self, step: int, action: Callable[[], None]) -> None:
        """Run `action` on rank 0; its OSError is raised on every rank."""
        error = None
        if self._topology.is_main:
            try:
                action()
            except OSError as caught:
                error = caught
        self._agree(step, error)

    def _agree(self, step: int, error: BaseException | None) -> None:
        """Raise on every rank if there is an error on any, and remove what was written of `step`."""
        found = self._topology.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        failed = [f"rank {rank}: {message}" for rank, message in enumerate(found) if message is not None]
        if not failed:
            return
        if self._topology.is_main:
            with contextlib.suppress(OSError):  # it may be a newer start's
                lease.check(self._run.dir)
                shutil.rmtree(self._partial(step), ignore_errors=True)
        raise OSError(f"the checkpoint of step {step} could not be saved: {'; '.join(failed)}; earlier checkpoints "
                      f"in {self.folder} are whole")

    # ---- restoring ---------------------------------------------------------------------------------------

    def restore(self, checkpoint: Path | None) -> dict[str, Any] | None:
        """Load `checkpoint`, the same on every rank, in place; None to begin at the start.

        Returns the loop_state that `save` was given, with its "step". Random states come back in the layout that saved
        them; in another one they are seeded from (run.seed, step). ValueError for a checkpoint that is damaged, of
        another model, or that a rank cannot see.
        """
        if checkpoint is None:
            return None
        self._check_visible(checkpoint)
        manifest = self._verified(checkpoint)
        reader = ShardReader(checkpoint, manifest["parameters"])
        for slot, parameter in self._slots:
            self._read_parameter(reader, slot, parameter)
        self._read_buffers(checkpoint / BUFFERS)
        set_step_count(self._optimizer, manifest["optimizer_steps"])
        if manifest["layout"] == self._layout():
            states = torch.load(checkpoint / "random.pt", weights_only=False)
            _restore_random_state(states[self._topology.rank])
        else:
            _seed_random_state(self._run.seed + manifest["step"])
        state = json.loads((checkpoint / "loop.json").read_text())
        if self._topology.is_main:
            files.set_aside_after(checkpoint)
        self._topology.barrier()
        return state

    def reset_optimizer(self) -> None:
        """Adam as at the start: moments and step counters are zero. Weights stay."""
        for shard in self._shards.values():
            tensors = shard.tensors()
            for kind in KINDS[1:]:
                tensors[kind].zero_()
        set_step_count(self._optimizer, 0)

    def _check_visible(self, checkpoint: Path) -> None:
        """ValueError on every rank when some rank's machine does not have the folder."""
        seen = checkpoint.is_dir()  # what is missing inside is damage
        mine = None if seen else f"rank {self._topology.rank} on {os.uname().nodename}"
        blind = [each for each in self._topology.gather_objects(mine) if each is not None]
        if blind:
            raise ValueError(f"{', '.join(blind)} cannot see {checkpoint.resolve()}: run.dir={self._run.dir} must be a "
                             "folder that every node of the run shares")

    def _verified(self, checkpoint: Path) -> dict[str, Any]:
        """The manifest; every rank reads its share of the files, and all raise what one has found."""
        here, error, manifest = self._topology, None, {}
        try:
            manifest = files.read_manifest(checkpoint)
            files.check_model(checkpoint, manifest, dataclasses.asdict(self._policy.config), self._adapters,
                              mtp=self._policy.mtp is not None)
            files.check_sums(checkpoint, manifest, sorted(manifest["files"])[here.rank::here.world_size])
        except ValueError as caught:
            error = caught
        found = [each for each in here.gather_objects(error) if each is not None]
        if found:
            raise here.broadcast_object(files.explained(found[0], checkpoint) if here.is_main else None)
        return manifest

    @torch.no_grad()
    def _read_parameter(self, reader: ShardReader, slot: Slot, parameter: torch.nn.Parameter) -> None:
        weight = self._read(reader, "weight", slot, 0, parameter.numel())
        parameter.data.copy_(weight.view(parameter.shape))
        if parameter not in self._shards:  # another data-parallel rank holds its optimiser state
            return
        held = self._shards[parameter]
        tensors = held.tensors()
        tensors["weight"].copy_(weight[held.start:held.end])
        for kind in KINDS[1:]:
            tensors[kind].copy_(self._read(reader, kind, slot, held.start, held.end))

    def _read_buffers(self, file: Path) -> None:
        saved = load_file(file) if self._buffers else {}
        for slot, buffer in self._buffers:
            buffer.copy_(saved[slot.key])

    def _read(self, reader: ShardReader, kind: str, slot: Slot, start: int, end: int) -> torch.Tensor:
        """Elements [start, end) of this rank's piece of a parameter, however many pieces were saved."""
        index, size = self._place(slot)
        saved = reader.num_pieces(slot.key)
        if saved == size:
            return reader.read(kind, slot.key, index, start, end)
        whole = slot.unshard([reader.read_piece(kind, slot.key, piece) for piece in range(saved)])
        return slot.shard([tensor for _, tensor in whole], index, size).reshape(-1)[start:end]

    # ---- who holds what ----------------------------------------------------------------------------------

    def _layout(self) -> dict[str, int]:
        here = self._topology
        return {"world_size": here.world_size, "tp": here.tp_size, "pp": here.pp_size, "ep": here.ep_size,
                "etp": here.etp_size, "cp": here.cp_size}

    def _place(self, slot: Slot) -> tuple[int, int]:
        """(number, count) of this rank's piece of a parameter."""
        if slot.cut == "none":
            return 0, 1
        here = self._topology
        return (here.tp_rank, here.tp_size) if slot.over == "tp" else (here.etp_rank, here.etp_size)

    def _saves(self, slot: Slot, parameter: torch.nn.Parameter) -> bool:
        """Whether this rank is the one to save what it holds of a parameter."""
        here = self._topology
        if parameter not in self._shards:
            return False
        if slot.cut == "none" and (here.tp_rank if slot.over == "tp" else here.etp_rank) > 0:
            return False
        first_copy = here.dp_rank == here.cp_rank == 0 if slot.over == "tp" else here.expert_dp_rank == 0
        return first_copy or not self._shards[parameter].replicated

    def _held(self, slot: Slot, parameter: torch.nn.Parameter) -> Held:
        part = self._shards[parameter]
        return Held(slot.key, self._place(slot)[0], tuple(parameter.shape), part.start, part.end)


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _random_state() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(), "megatron": tensor_parallel.get_cuda_rng_tracker().get_states()}


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])


def _seed_random_state(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
