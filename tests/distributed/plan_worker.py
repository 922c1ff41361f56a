"""What real Megatron policies hold and keep, for test_plan.py: `python -m tests.distributed.plan_worker FOLDER`.

Forks WORLD_SIZE ranks; each builds every case, runs one optimiser step on micro-batches of exactly TOKENS tokens and
writes what it counted to FOLDER/measured.pt (rank 0, all ranks in order).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch

from megatron_rl import topology
from megatron_rl.batch import pack
from megatron_rl.config.load import build
from megatron_rl.config.schema import Config, ParallelConfig
from megatron_rl.model.architectures import read_config
from megatron_rl.model.build import build_policy
from megatron_rl.model.convert import load_hf
from megatron_rl.rollout.ports import choose_port
from megatron_rl.train_step.optimizer import build_mtp_optimizer, build_optimizer, chained
from megatron_rl.train_step.step import TrainStep
from megatron_rl.types import TrainSample

WORLD_SIZE, TOKENS, MICROBATCHES = 4, 384, 4
MODEL = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 3,
         "num_shared_experts": 2, "moe_intermediate_size": 56, "first_k_dense_replace": 1}
SECOND = {**MODEL, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "num_nextn_predict_layers": 1}
"""The bailing_moe_v2 beside it, for cases with model.mtp."""
LATENT = {**{key: value for key, value in MODEL.items() if key not in ("num_experts", "num_shared_experts")},
          "num_key_value_heads": 8, "n_routed_experts": 8, "n_shared_experts": 2, "q_lora_rank": 40, "kv_lora_rank": 48,
          "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
"""The deepseek_v2 beside it, for cases whose name begins with `latent_`."""
CASES: dict[str, dict] = {
    "dp4": {},
    "plain": {"parallel": {"ep": 2, "distributed_optimizer": False}},
    "ep4_bf16": {"parallel": {"ep": 4}, "model": {"dtype": "bfloat16"}},
    "plain_bf16": {"parallel": {"distributed_optimizer": False}, "model": {"dtype": "bfloat16"}},
    "tp2": {"parallel": {"tp": 2}},
    "tp2_etp2": {"parallel": {"tp": 2, "etp": 2}},
    "tp2_pp2_ep2": {"parallel": {"tp": 2, "pp": 2, "ep": 2}},
    "cp2_ep2": {"parallel": {"cp": 2, "ep": 2}},
    "pp4": {"parallel": {"pp": 4}},
    "pp2_vpp2": {"parallel": {"pp": 2, "vpp": 2}},
    "ep2_selective": {"parallel": {"ep": 2}, "model": {"recompute": "selective"}},
    "tp2_selective_attention": {"parallel": {"tp": 2}, "model": {
        "recompute": "selective", "recompute_modules": ["core_attn", "shared_experts"]}},
    "ep2_mtp": {"parallel": {"ep": 2}, "model": {"mtp": True}},
    "tp2_mtp_bf16": {"parallel": {"tp": 2, "ep": 2}, "model": {"mtp": True, "dtype": "bfloat16"}},
    "mtp_recompute": {"model": {"mtp": True, "recompute": "full"}},
    "pp2_recompute": {"parallel": {"pp": 2, "ep": 2}, "model": {"recompute": "full"}},
}


CASES |= {f"latent_{case}": CASES[case] for case in ("plain_bf16", "tp2_pp2_ep2", "cp2_ep2")}


def case_config(case: str) -> Config:
    """Sections of CASES over one step of WORLD_SIZE ranks."""
    sections = CASES[case]
    parallel = {"world_size": WORLD_SIZE, **sections.get("parallel", {})}
    return build({**sections, "parallel": parallel, "batch": {"tokens_per_microbatch": TOKENS}})


class LiveSaved:
    """Bytes that autograd holds for backward passes, each storage once, parameters apart; `peak` is the most."""

    def __init__(self, parameters):
        self._apart = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._users: dict[int, int] = {}
        self._live = self.peak = 0

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def _pack(self, tensor):
        return _Held(self, tensor)

    def add(self, storage: torch.UntypedStorage, users: int) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._apart or size == 0:
            return
        before = self._users.get(key, 0)
        self._users[key] = before + users
        if before == 0 or before + users == 0:
            self._live += size * users
            self.peak = max(self.peak, self._live)


class _Held:
    def __init__(self, live: LiveSaved, tensor: torch.Tensor):
        self._live, self.tensor = live, tensor
        live.add(tensor.untyped_storage(), 1)

    def __del__(self):
        self._live.add(self.tensor.untyped_storage(), -1)


def sequence_lengths(cp: int) -> tuple[int, int, int]:
    """Positions over all context-parallel ranks."""
    tokens = TOKENS * cp
    return tokens // 2, tokens // 3, tokens - tokens // 2 - tokens // 3


def microbatches(parallel: ParallelConfig, here: topology.Topology) -> list:
    """MICROBATCHES times one of three ragged sequences and TOKENS tokens on each context-parallel rank: equal loads,
    so that ranks add up to the plan's even ones."""
    rng = np.random.default_rng(0)
    samples = [TrainSample(i, rng.integers(0, MODEL["vocab_size"], n + 1).astype(np.int32), np.arange(n + 1) > 4,
                           np.zeros(n + 1, np.float32), 1.0, n) for i, n in enumerate(sequence_lengths(here.cp_size))]
    return [pack(samples, multiple_of=parallel.token_multiple, cp_size=here.cp_size,
                 cp_rank=here.cp_rank)] * MICROBATCHES


def mean_logprob(batch, logprobs_T, entropy_T):
    return -(logprobs_T + 0.01 * entropy_T).mean(), {}


def folder_of(folder: Path, case: str) -> Path:
    if case.startswith("latent_"):
        return folder.with_name("latent")
    return folder.with_name("second") if case_config(case).model.mtp else folder


def measure(folder: Path, case: str) -> dict:
    config, folder = case_config(case), folder_of(folder, case)
    here = topology.start(config.parallel, seed=0)
    policy = build_policy(read_config(folder), config.model, config.parallel, with_gradients=True)
    load_hf(policy, here, folder)
    optimizer = build_optimizer(policy, config.optimizer, config.parallel)
    mtp_optimizer = build_mtp_optimizer(policy, config.optimizer, config.parallel)
    step = TrainStep(policy, optimizer, here, temperature=1.0, chunk_tokens=64, mtp_optimizer=mtp_optimizer)
    behind = [] if policy.mtp is None else [policy.mtp]
    named = [item for module in (*policy.gpt_models, *behind) for item in module.named_parameters()]
    live = LiveSaved([parameter for _, parameter in named])
    batches = microbatches(config.parallel, here)
    _, counts = step.count_routing(batches)
    with live.hooks():
        step.update(batches, mean_logprob, lr=1e-3, balance_coef=0.01, z_loss_coef=0.01, counts=counts)
    chunks = [*policy.chunks, *([] if policy.mtp_chunk is None else [policy.mtp_chunk])]
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    found = {
        "stage": here.pp_rank,
        "dense_parameters": sum(p.numel() for name, p in named if "local_experts" not in name),
        "expert_parameters": sum(p.numel() for name, p in named if "local_experts" in name),
        "weights": sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for _, p in named}.values()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": optimizer_bytes(chained(optimizer, mtp_optimizer),
                                     {p.untyped_storage().data_ptr() for _, p in named}),
        "activations": live.peak,
    }
    topology.stop(keep_processes=True)
    return found


def optimizer_bytes(optimizer, weights: set[int]) -> int:
    """Moments, and the parameters that the optimiser steps where they are not the network's own."""
    total = 0
    for each in (o for o in optimizer.chained_optimizers if o.optimizer is not None):
        own = [p for group in each.optimizer.param_groups for p in group["params"]]
        total += sum(p.nbytes for p in own if p.untyped_storage().data_ptr() not in weights)
        total += sum(each.optimizer.state[p][key].nbytes for p in own for key in ("exp_avg", "exp_avg_sq"))
    return total


def run_rank(rank: int, folder: Path, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    found = {case: measure(folder, case) for case in CASES}
    gathered = [None] * WORLD_SIZE
    torch.distributed.all_gather_object(gathered, found)
    if rank == 0:
        torch.save(gathered, folder / "measured.pt")
    topology.stop()


def main(folder: str) -> None:
    port = choose_port(None)
    torch.multiprocessing.start_processes(run_rank, args=(Path(folder), port), nprocs=WORLD_SIZE, start_method="fork")


if __name__ == "__main__":
    main(sys.argv[1])
