"""The processes behind test_checkpoint.py: save in some layouts, resume in others, and say what each rank's state is.

`python -m tests.distributed.checkpoint_worker DATA OUT` forks ranks after the imports, world size after world size.
DATA holds step.pt and the models, as for worker.py; rank 0 writes SOURCE.pt and SOURCE-TARGET.pt to OUT.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import tests.distributed.cases as cases
from megatron_rl import topology
from megatron_rl.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from megatron_rl.handoff import dump, load
from megatron_rl.model import host_states
from megatron_rl.model.adam_state import adam_shards, step_count
from megatron_rl.model.architectures import read_config
from megatron_rl.model.build import build_policy
from megatron_rl.model.checkpoint import ORCHESTRATOR_STATE, Checkpoints
from megatron_rl.model.checkpoint_files import choose
from megatron_rl.model.convert import Exporter, fill_adapters, load_hf, trained_slots
from megatron_rl.rollout.ports import choose_port
from megatron_rl.train_step.optimizer import build_mtp_optimizer, build_optimizer, chained, settle
from megatron_rl.train_step.step import TrainStep
from tests.distributed.checkpoint_cases import LOOP_STATE, PAIRS, ROLLOUTS, SOURCES, Case
from tests.distributed.lora_cases import drawn_matrix
from tests.distributed.worker import microbatches_of, token_loss

host_states.OFFLOAD_SLICE = 2000
"""Several slices for each of the tiny model's optimisers, some of one large shard."""


class Trainer:
    """Policy, optimiser and checkpoints of one case, as a recipe would build them."""

    def __init__(self, data: Path, case: Case, run: RunConfig):
        parallel = ParallelConfig(**cases.LAYOUTS[case.layout], distributed_optimizer=case.distributed)
        model = data / (f"{case.network}/checkpoint" if case.network else "norm_head_True")
        self.here = topology.start(parallel, seed=run.seed)
        options = ModelConfig(path=str(model), dtype=case.dtype, **cases.KERNELS[case.kernels], lora=case.lora,
                              mtp=case.mtp)
        self.policy = build_policy(read_config(model), options, parallel, with_gradients=True)
        load_hf(self.policy, self.here, model)
        fill_adapters(self.policy, self.here, drawn_matrix)
        options = OptimizerConfig(**cases.OPTIMIZER)
        optimizer = build_optimizer(self.policy, options, parallel)
        settle(optimizer, self.policy, offload=case.offload)
        mtp_optimizer = build_mtp_optimizer(self.policy, options, parallel, offload=case.offload)
        self.optimizer = chained(optimizer, mtp_optimizer)
        self.checkpoints = Checkpoints(run, self.policy, self.optimizer, self.here)
        self._step = TrainStep(self.policy, optimizer, self.here, temperature=cases.TEMPERATURE, chunk_tokens=16,
                               mtp_optimizer=mtp_optimizer)
        self._layout, self._colocated = case.layout, case.offload
        self._data: cases.Step = torch.load(data / case.network / "step.pt", weights_only=False)

    def update(self) -> None:
        batches = microbatches_of(self._data, self.here, self._layout, 2)
        _, counts = self._step.count_routing(batches)
        self._step.update(batches, token_loss, lr=cases.LEARNING_RATE, balance_coef=cases.BALANCE_COEF,
                          z_loss_coef=cases.Z_LOSS_COEF, counts=counts)
        if self._colocated:
            self._step.release_gradients()
            for _, parameter in trained_slots(self.policy, self.here):
                assert parameter.main_grad.untyped_storage().size() == 0

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """What trains, its master weights and moments under their Hugging Face names, on rank 0."""
        found = {"model": self._exported()}
        owned = trained_slots(self.policy, self.here)
        shards = adam_shards(self.optimizer, [parameter for _, parameter in owned])
        kept = [parameter.data for _, parameter in owned]
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            for slot, parameter in owned:
                whole = torch.zeros(parameter.numel())
                if parameter in shards:
                    shard = shards[parameter]
                    whole[shard.start:shard.end] = shard.tensors()[kind]
                    if shard.replicated:
                        whole /= self._copies(slot).size()
                torch.distributed.all_reduce(whole, group=self._copies(slot))
                parameter.data = whole.view(parameter.shape)
            found[kind] = self._exported()
            for (_, parameter), data in zip(owned, kept, strict=True):
                parameter.data = data
        return found

    def _exported(self) -> dict[str, torch.Tensor]:
        exporter = Exporter(self.policy, self.here, adapters=self.policy.adapters is not None)
        return {name: tensor.clone() for name, tensor in exporter()}

    @staticmethod
    def _copies(slot):
        """The ranks that hold a parameter's data-parallel copies."""
        if slot.over == "tp":
            return topology.parallel_state.get_data_parallel_group(with_context_parallel=True)
        return topology.parallel_state.get_expert_data_parallel_group()


def run_of(out: Path, source: str, *, resume: bool) -> RunConfig:
    return RunConfig(dir=str(out / source), resume=resume, seed=3)


def save(data: Path, out: Path, case: Case) -> None:
    """Two steps, a checkpoint, one step more."""
    run = run_of(out, case.name, resume=False)
    Path(run.dir).mkdir(exist_ok=True)
    trainer = Trainer(data, case, run)
    trainer.update()
    trainer.update()
    random.seed(case.name + str(trainer.here.rank))
    torch.manual_seed(trainer.here.rank + 17)
    trainer.checkpoints.save(2, LOOP_STATE, {ORCHESTRATOR_STATE: dump(ROLLOUTS)})
    result = {"state": trainer.state(), "steps": step_count(trainer.optimizer), "random": draws(trainer.here)}
    trainer.update()
    result["next"] = trainer.state()
    finish(trainer, result, out / f"{case.name}.pt")


def resume(data: Path, out: Path, source: str, case: Case) -> None:
    """What the checkpoint of `source` becomes in the layout of `case`, and after one step more."""
    trainer = Trainer(data, case, run_of(out, source, resume=True))
    checkpoint = choose(run_of(out, source, resume=True))
    loop_state = trainer.checkpoints.restore(checkpoint)
    loop_state["rollouts"] = load((checkpoint / ORCHESTRATOR_STATE).read_bytes())
    result = {"state": trainer.state(), "steps": step_count(trainer.optimizer), "random": draws(trainer.here),
              "loop_state": loop_state}
    trainer.update()
    result["next"] = trainer.state()
    finish(trainer, result, out / f"{source}-{case.name}.pt")


def draws(here: topology.Topology) -> list[tuple[float, float]]:
    """The next random numbers of every rank."""
    return here.gather_objects((random.random(), float(torch.rand(()))))


def finish(trainer: Trainer, result: dict, path: Path) -> None:
    if trainer.here.is_main:
        torch.save(result, path)
    topology.stop(keep_processes=True)


def run_rank(rank: int, data: Path, out: Path, world_size: int, port: int, jobs: Sequence[tuple]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    for function, *arguments in jobs:
        function(data, out, *arguments)
    topology.stop()


def main(data: str, out: str) -> None:
    saves = [(save, case) for case in SOURCES]
    resumes = [(resume, source, target) for source, target in PAIRS]
    for jobs in (saves, resumes):
        for world_size in (1, 2, 4):
            chosen = [job for job in jobs if job[-1].world_size == world_size]
            torch.multiprocessing.start_processes(
                run_rank, args=(Path(data), Path(out), world_size, choose_port(None), chosen),
                nprocs=world_size, start_method="fork")


if __name__ == "__main__":
    main(*sys.argv[1:])
