"""Checkpoints: weights, optimiser, random states and whatever the loop adds; written whole or not at all.

Layout of a run: <run>/checkpoints/step_00000020/ holds Megatron's distributed checkpoint (state/) and
loop.json. A checkpoint is written under a name that ends in .partial and renamed when every rank is done, so a
kill or a full disk leaves the last whole one in place.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing

from megatron_rl.compat.megatron_checkpoint import keep_write_results_in_process
from megatron_rl.model.build import Policy
from megatron_rl.topology import Topology

_NAME = re.compile(r"^step_(\d{8})$")
# mem_efficient: optimiser state is gathered on data-parallel rank 0 alone, not on every rank
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True,
             "distrib_optim_fully_reshardable_mem_efficient": True}


class Checkpoints:
    """Saves and restores one run's state under `folder`; keeps the newest `keep`."""

    def __init__(self, folder: str | Path, policy: Policy, optimizer, topology: Topology, *, keep: int):
        keep_write_results_in_process()
        self.folder = Path(folder)
        self._policy, self._optimizer, self._topology, self._keep = policy, optimizer, topology, keep

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        steps = [int(match.group(1)) for path in self.folder.glob("step_*") if (match := _NAME.match(path.name))]
        return max(steps, default=None)

    def save(self, step: int, loop_state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step` completed steps. OSError (no space, ...) leaves the earlier ones untouched."""
        final = self._path(step)
        partial = final.with_suffix(".partial")
        if self._topology.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "state").mkdir(parents=True)
        self._topology.barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist_checkpointing.save(self._sharded_state(is_loading=False), str(partial / "state"))
        random_states = self._topology.gather_objects(_random_state())
        if self._topology.is_main:
            torch.save(random_states, partial / "random.pt")
            _write_synced(partial / "loop.json", json.dumps({"step": step, "layout": self._layout(), **loop_state}))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            self._drop_old()
        self._topology.barrier()
        return final

    def load(self, step: int) -> dict[str, Any]:
        """Restore weights, optimiser and random states in place; returns the loop's own state."""
        folder = self._path(step)
        loop_state = json.loads((folder / "loop.json").read_text())
        if loop_state["layout"] != self._layout():
            raise ValueError(f"{folder} was saved with {loop_state['layout']}, this run has {self._layout()}; "
                             "resume with the same parallel.* sizes")
        self._create_optimizer_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = dist_checkpointing.load(self._sharded_state(is_loading=True), str(folder / "state"))
        for name, gpt in self._models():
            gpt.load_state_dict(state[name], strict=False)
        self._optimizer.load_state_dict(state["optimizer"])
        _restore_random_state(torch.load(folder / "random.pt", weights_only=False)[self._topology.rank])
        return loop_state

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _layout(self) -> dict[str, int]:
        here = self._topology
        return {"world_size": here.world_size, "tp": here.tp_size, "pp": here.pp_size, "ep": here.ep_size,
                "etp": here.etp_size, "cp": here.cp_size}

    def _models(self):
        gpt_models = self._policy.gpt_models
        return [("model" if len(gpt_models) == 1 else f"model{i}", gpt) for i, gpt in enumerate(gpt_models)]

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, gpt in self._models():
            sharded = gpt.sharded_state_dict(metadata=_SHARDING)
            state[name] = {key: value for key, value in sharded.items() if not key.endswith("_extra_state")}
        models = state["model"] if "model" in state else dict(state)
        state["optimizer"] = self._optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=_SHARDING)
        return state

    def _create_optimizer_state(self) -> None:
        """torch's Adam creates its moments at the first step; DistributedOptimizer.state_dict wants them before."""
        for optimizer in _inner_optimizers(self._optimizer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if not optimizer.state[parameter]:
                        optimizer.state[parameter] = {
                            "step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter),
                            "exp_avg_sq": torch.zeros_like(parameter)}

    def _drop_old(self) -> None:
        whole = sorted(path for path in self.folder.glob("step_*") if _NAME.match(path.name))
        for path in whole[:-self._keep]:
            shutil.rmtree(path)


def _inner_optimizers(optimizer) -> list[torch.optim.Optimizer]:
    chained = optimizer.chained_optimizers if hasattr(optimizer, "chained_optimizers") else [optimizer]
    return [each.optimizer for each in chained if each.optimizer is not None]


def _random_state() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
