"""PROGRAM 2: a rank of the trainer. It builds the policy, then does what the orchestrator says (loop.obey).

A command may come twice, from an orchestrator that died before it heard the outcome. For a step that is already done,
`train` and `save` return their old outcome.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from megatron_rl import loop, topology
from megatron_rl.config.load import build
from megatron_rl.config.schema import Config
from megatron_rl.model.adapter_folder import ADAPTER_FOLDER, PEFT_CONFIG
from megatron_rl.model.architectures import read_config
from megatron_rl.model.checkpoint import ORCHESTRATOR_STATE, Checkpoints
from megatron_rl.model.convert import Exporter
from megatron_rl.observe import lease
from megatron_rl.observe.timing import PhaseFile, Timers
from megatron_rl.plan import check_fits
from megatron_rl.trainer.client import Heartbeat, Link
from megatron_rl.trainer.export import export, export_adapters
from megatron_rl.trainer.learner import PolicyLearner
from megatron_rl.trainer.probe import Probe
from megatron_rl.trainer.sender import AdapterSender, Sender
from megatron_rl.types import StepResult

APPEARS_S = 10.0


def run(config: Config) -> None:
    """What every rank does, from joining the others to the command `finish`."""
    options = config.orchestrator
    lease.Watch(config.run.dir).start()
    here = topology.start(config.parallel, seed=config.run.seed,
                          timeout_s=max(topology.TIMEOUT_S, 2 * options.wait_timeout_s))
    heartbeat = Heartbeat(options, here.rank)
    heartbeat.start()
    loop.obey(Trainer(here, link := Link(options, here), heartbeat), link)
    heartbeat.stop()
    topology.stop()


class Trainer:
    """loop.Trainer: one rank's part of every command. All ranks call the same method with the same arguments."""

    def __init__(self, here: topology.Topology, link: Link, heartbeat: Heartbeat):
        self._here, self._link, self._heartbeat = here, link, heartbeat
        self._learner: PolicyLearner | None = None
        self._sender: Sender | None = None
        self._expected: list[tuple[str, int]] = []  # whose checksums rank 0 knows, with rollout.publish=adapter
        self._done: dict[str, tuple[int, dict[str, Any]]] = {}  # kind -> (step, outcome) of the last one
        self.steps_done = 0

    def execute(self, command: dict[str, Any]) -> dict[str, Any]:
        """The outcome. It is the same on all ranks, or only rank 0's matters."""
        kind, arguments = command["kind"], {key: value for key, value in command.items() if key != "kind"}
        self._heartbeat.doing = " ".join([kind, *(str(arguments[key]) for key in ("step", "version")
                                                  if key in arguments)])
        before = self._done.get(kind)
        if before is not None and before[0] == arguments["step"]:
            return before[1]
        outcome = getattr(self, f"_{kind}")(**arguments)
        if kind in ("train", "save"):
            self._done[kind] = (arguments["step"], outcome)
        self._heartbeat.doing = "waits for a command"
        return outcome

    def _start(self, config: dict[str, Any], checkpoint: str | None, stage: int | None, schedule_updates: int,
               reset_optimizer: bool, written: str | None = None) -> dict[str, Any]:
        """Builds the policy from `checkpoint`, or from model.path. If called again, only says where it stands."""
        if self._learner is None:
            self._config = build(config)
            self._check_shared(written)
            self._check_memory()
            engine, alone = self._config.rollout.engine, self._config.rollout.publish == "adapter"
            if self._here.is_main:
                self._sender = (AdapterSender if alone else Sender)(
                    self._config, read_config(self._config.model.path), self._here.device)
            if engine.colocate:
                self._make_room(list(engine.urls))
            self._learner = PolicyLearner(self._config, self._here, schedule_updates, stage)
            self._checkpoints = Checkpoints(self._config.run, self._learner.policy, self._learner.optimizer,
                                            self._here)
            self._restore(None if checkpoint is None else Path(checkpoint), reset_optimizer)
            self._probe = Probe(self._learner, self._config, self._here)
            self._sent = Exporter(self._learner.policy, self._here, adapters=True) if alone else self._learner.exporter
            if engine.colocate:
                self._leave_room()
        return {"steps_done": self.steps_done, "probe_tokens": self._probe.token_ids.tolist()}

    def _check_shared(self, written: str | None) -> None:
        """ValueError on every rank, naming machines and folders, if some machine does not share run.dir or the model,
        or another folder of weights that its ranks read.

        written: a file that the orchestrator has just made in run.dir.
        """
        run_dir, model, algo = self._config.run.dir, self._config.model, self._config.algo
        folders = {"model.path": model.path, **algo.distillation.checkpoints}
        if model.reference_path is not None and algo.loss.kl_coef > 0:
            folders["model.reference_path"] = model.reference_path
        if model.lora.path is not None:
            folders["model.lora.path"] = model.lora.path
        missing = []
        if written is not None and not _appears(Path(written)):
            missing.append(f"run.dir={run_dir} (it lacks {written}, which the orchestrator has written)")
        missing += [f"{key}={folder}" for key, folder in folders.items()
                    if not any((Path(folder) / name).is_file() for name in ("config.json", PEFT_CONFIG))]
        here = f"rank {self._here.rank} on {os.uname().nodename} does not see "
        blind = [each for each in self._here.gather_objects(here + " and ".join(missing) if missing else None) if each]
        if blind:
            raise ValueError(f"{'; '.join(blind)}: every machine of the run must share these folders")

    def _check_memory(self) -> None:
        """ValueError on every rank, naming the machine, if some machine has too little memory for its ranks.

        Even a single one may be another than the launcher's: a Slurm job is submitted elsewhere.
        """
        names, name, refusal = self._here.gather_objects(os.uname().nodename), os.uname().nodename, None
        ranks = names.count(name)
        try:
            check_fits(read_config(self._config.model.path), self._config, ranks=ranks, machine=name,
                       which=f"{ranks} ranks")
        except ValueError as error:
            refusal = str(error)
        refusals = [each for each in self._here.gather_objects(refusal) if each is not None]
        if refusals:
            raise ValueError(refusals[0])

    def _restore(self, checkpoint: Path | None, reset_optimizer: bool) -> None:
        state = self._checkpoints.restore(checkpoint)
        if state is None:
            return
        self.steps_done = state["step"]
        self._done["save"] = (self.steps_done, {})  # it is on the disk
        self._learner.load_state_dict(state)
        if reset_optimizer:
            self._checkpoints.reset_optimizer()
            self._learner.updates_done = 0

    def _publish(self, version: int, urls: list[str], layouts: list[tuple[str, int]]) -> dict[str, Any]:
        """Sends the weights to the engines at `urls`, which stay paused until the orchestrator has checked them."""
        reference = self._probe()
        if self._sent is not self._learner.exporter and layouts != self._expected:
            self._expect_base(layouts)
        tensors, outcome = self._sent(), {}
        if self._sender is not None:
            outcome = {**self._sender.send(tensors, version, urls, layouts=layouts),
                       "reference": reference.tolist()}
        for _ in tensors:  # on rank 0: what a failed publish left, which the other ranks send all the same
            pass
        self._here.barrier()
        return outcome

    def _expect_base(self, layouts: list[tuple[str, int]]) -> None:
        """Rank 0 learns the checksums of the weights that engines hold beside the adapters that they are sent."""
        with self._learner.policy.adapters.off():
            weights = self._learner.exporter()
            if isinstance(self._sender, AdapterSender):
                self._sender.expect(weights, layouts)
            for _ in weights:
                pass
        self._expected = layouts

    def _make_room(self, urls: list[str]) -> dict[str, Any]:
        """Engines that share the trainer's GPUs give up their memory until the next publish."""
        if self._sender is not None:
            self._sender.make_room(urls)
        self._here.barrier()
        return {}

    def _train(self, step: int) -> dict[str, Any]:
        """Runs the optimiser steps of one step of the loop on this rank's shard."""
        if step != self.steps_done:
            raise RuntimeError(f"asked to train step {step} after {self.steps_done} steps")
        timers = Timers(PhaseFile(self._config.run.dir).write if self._here.is_main else None)
        with timers("handoff"):
            updates = self._link.shard(step)
        results = self._learner.learn(updates, timers)
        self.steps_done = step + 1
        self._checkpoints.poll()
        if self._config.rollout.engine.colocate:
            self._leave_room()
        return {"results": [_plain(result) for result in results], "seconds": timers.pop()}

    def _leave_room(self) -> None:
        """Frees for colocated engines what only a step needs: gradients, and what torch keeps for the next one."""
        self._learner.step.release_gradients()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _save(self, step: int, loop_state: dict[str, Any]) -> dict[str, Any]:
        """Writes a checkpoint with both programs' state in one folder."""
        files = {ORCHESTRATOR_STATE: self._link.state(step)} if self._here.is_main else {}
        self._checkpoints.save(step, {**self._learner.state_dict(), **loop_state}, files)
        return {}

    def _finish(self, export_hf: bool) -> dict[str, Any]:
        self._checkpoints.finish()
        if export_hf:
            folder = Path(self._config.run.dir)
            export(self._config, self._learner.exporter, self._here, folder / "hf")
            export_adapters(self._config, self._learner.policy, self._here, folder / ADAPTER_FOLDER)
        if self._sender is not None:
            self._sender.close()
        return {}


def _appears(file: Path) -> bool:
    """Whether the file is there, or soon is: a network file system may show it late."""
    deadline = time.monotonic() + APPEARS_S
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _plain(result: StepResult) -> dict[str, Any]:
    return {"sums": {key: [float(each.sum), float(each.count)] for key, each in result.sums.items()},
            "gauges": dict(result.gauges), "skipped": result.skipped}
