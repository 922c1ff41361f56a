"""What runs on the pretended GPU: layouts, recipes, rules of CUDA, and faults to plant into lines of the trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.gpu.pretended import GLOO, LEAK, MIXED, NCCL, NUMPY

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("sft", "rl")
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"model.recompute": "full", "algo.router_replay": "trainer", "run.steps": 2,
            "run.dump_steps": [1]},
    "one_float32": {"model.dtype": "float32", "model.kernels.experts": "loop", "model.kernels.router": "reference",
                    "rollout.publish": "disk", "optimizer.offload": True},
    "dp2": {"parallel.distributed_optimizer": False, "rollout.publish": "broadcast", "run.steps": 2,
            "optimizer.offload": True, "model.recompute": "selective",
            "run.dump_steps": [1]},
    "ep2": {"parallel.ep": 2, "parallel.overlap": True, "model.recompute": "full", "run.async_save": True,
            "run.steps": 2},
    "ep2_allgather": {"parallel.ep": 2, "parallel.token_dispatcher": "allgather", "algo.router_replay": "rollout",
                      "model.backend": "megatron"},
    "tp2": {"parallel.tp": 2, "model.backend": "megatron", "model.kernels.experts": "grouped_mm",
            "rollout.publish": "broadcast"},
    "tp2_ep2": {"parallel.tp": 2, "parallel.ep": 2, "model.recompute": "full", "algo.router_replay": "trainer"},
    "tp2_etp2": {"parallel.tp": 2, "parallel.etp": 2, "algo.updates_per_rollout": 2, "optimizer.offload": True,
                 "model.recompute": "selective", "model.recompute_modules": ["core_attn", "shared_experts"]},
    "pp2": {"parallel.pp": 2, "algo.router_replay": "rollout", "rollout.publish": "disk"},
    "pp2_vpp2": {"parallel.pp": 2, "parallel.vpp": 2, "model.recompute": "full"},
    "cp2": {"parallel.cp": 2, "model.backend": "megatron", "algo.router_replay": "trainer"},
    "tp2_ep2_lora": {"parallel.tp": 2, "parallel.ep": 2, "model.lora.rank": 8, "model.recompute": "full",
                     "run.steps": 2, "run.dump_steps": [1]},
    "cp2_ep2": {"parallel.cp": 2, "parallel.ep": 2, "model.recompute": "full", "algo.router_replay": "rollout"},
}
"""Keys of the configuration. If they say nothing: bfloat16, model.backend=torch (`auto` on a GPU), the distributed
optimiser, weights through shared memory. A name that begins with "one" has one rank, the others have two."""


def world_size(layout: str) -> int:
    return 1 if layout.startswith("one") else 2


def model_of(layout: str) -> str:
    """The folder of its model: two layers, or four where each rank has two stages."""
    return "four_layers" if "vpp2" in layout else "two_layers"


def gradient_of_a_part(cuda: torch.Tensor, cpu: torch.Tensor) -> None:
    """Autograd makes the other part's zeros, on the memory's real device."""
    (first, _) = cuda.clone().requires_grad_().split(1)
    first.sum().backward()


RULES: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], object], str | None]] = {
    "sum": (lambda cuda, cpu: cuda + cpu, MIXED),
    "sum into one": (lambda cuda, cpu: cpu.add_(cuda), MIXED),
    "product": (lambda cuda, cpu: cuda @ cpu, MIXED),
    "choice by a mask": (lambda cuda, cpu: torch.where(cpu > 0, cuda, 0.0), MIXED),
    "sum with a view": (lambda cuda, cpu: cuda + cpu[:1], MIXED),
    "sum with a scalar": (lambda cuda, cpu: cuda + cpu.sum(), None),
    "stack with a scalar": (lambda cuda, cpu: torch.stack([cuda.sum(), cpu.sum()]), MIXED),
    "CPU indices": (lambda cuda, cpu: cuda[cpu.long()], None),
    "CUDA indices": (lambda cuda, cpu: cpu[cuda.long()], MIXED),
    "gathered by CPU indices": (lambda cuda, cpu: cuda.gather(0, cpu.long()), MIXED),
    "copied": (lambda cuda, cpu: cuda.copy_(cpu), None),
    "moved up": (lambda cuda, cpu: cuda + cpu.to(cuda.device), None),
    "moved beside": (lambda cuda, cpu: cuda + cpu.to(cuda), None),
    "moved down": (lambda cuda, cpu: cpu + cuda.cpu(), None),
    "moved down and not back": (lambda cuda, cpu: cuda + cuda.cpu(), MIXED),
    "of another dtype": (lambda cuda, cpu: cuda + cuda.double(), None),
    "made there": (lambda cuda, cpu: cuda + torch.ones(2, 2, device=cuda.device), None),
    "made by the current device's number": (
        lambda cuda, cpu: cuda + torch.ones(2, 2, device=torch.cuda.current_device()), None),
    "made here": (lambda cuda, cpu: cuda + torch.ones(2, 2), MIXED),
    "made alike": (lambda cuda, cpu: cuda + torch.ones_like(cuda) + cuda.new_ones(2, 2), None),
    "made alike, but here": (lambda cuda, cpu: cuda + torch.ones_like(cuda, device="cpu"), MIXED),
    "values there": (lambda cuda, cpu: cuda + torch.tensor([1.0, 2.0], device="cuda"), None),
    "values here": (lambda cuda, cpu: cuda + torch.tensor([1.0, 2.0]), MIXED),
    "numpy here": (lambda cuda, cpu: cuda + torch.from_numpy(np.ones((2, 2))), MIXED),
    "deep copy": (lambda cuda, cpu: cuda + copy.deepcopy(cuda), None),
    "gradient of a part": (gradient_of_a_part, None),
    "numpy": (lambda cuda, cpu: cuda.numpy(), NUMPY),
    "numpy of a copy": (lambda cuda, cpu: cuda.cpu().numpy(), None),
    "numpy by numpy": (lambda cuda, cpu: np.asarray(cuda[0]), NUMPY),
}
"""Operations on a CUDA tensor and a CPU tensor, both [2, 2] and 1, and the kind of what CUDA finds in them, or None."""


@dataclass(frozen=True)
class Plant:
    """A fault that is planted while `recipe` runs in `layout`: a line of `function` reads `new` instead of `old`.

    found_at: text of the line that must be named. found_in: its file, if that is not `file`.
    """

    kind: str
    layout: str
    recipe: str
    file: str
    function: str
    old: str
    new: str
    found_at: str
    found_in: str | None = None

    @property
    def place(self) -> str:
        """file:line that the finding must name. A file of Megatron is enough without the line."""
        path = self.found_in or self.file
        if path.startswith("megatron/"):
            return f"{path}:"
        lines = [number for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
                 if self.found_at in line]
        assert len(lines) == 1, f"{path} has {self.found_at!r} in lines {lines}"
        return f"{path}:{lines[0]} "


PLANTS: dict[str, Plant] = {
    "a factor of the rotation on the CPU": Plant(
        MIXED, "one", "sft", "megatron_rl/model/attention.py", "rotation",
        "model.head_dim, position_ids_T.device))", "model.head_dim))", "angles = torch.outer("),
    "a gradient's buffer on the CPU, in a backward pass of our own": Plant(
        MIXED, "one", "sft", "kernels/rl_kernels/linear_logprob/op.py", "_backward",
        "grad_scaled_TH = torch.zeros_like(hidden_TH, dtype=lse_T.dtype)",
        "grad_scaled_TH = torch.zeros(hidden_TH.shape, dtype=lse_T.dtype)",
        "torch.addmm(total, left, right, out_dtype", "kernels/rl_kernels/linear_logprob/products.py"),
    "recorded experts on the CPU": Plant(
        MIXED, "one", "rl", "megatron_rl/model/routing_replay.py", "MicrobatchRouting.choose",
        "replayed = experts.long()", "replayed = experts.long().cpu()", "missed = (replayed[:, :, None]"),
    "a mask on the CPU": Plant(
        MIXED, "one", "sft", "megatron_rl/recipes/sft.py", "TokenMeanLoss.__call__",
        "torch.where(batch.loss_mask, logprobs_T, 0.0)", "torch.where(batch.loss_mask.cpu(), logprobs_T, 0.0)",
        "masked = torch.where("),
    "the router's sums on the CPU": Plant(
        NCCL, "one", "sft", "megatron_rl/train_step/step.py", "TrainStep._metrics",
        "for key in ROUTER_SUMS], here.device)", "for key in ROUTER_SUMS], here.device).cpu()",
        "torch.distributed.all_reduce(router"),
    "the number of tokens on the CPU": Plant(
        NCCL, "dp2", "sft", "megatron_rl/train_step/step.py", "TrainStep._step_tokens",
        "self.topology.sum_over_data(tokens)", "self.topology.sum_over_data(tokens.cpu())",
        "dist.all_reduce(tensor, group=self.dp_cp_group)", "megatron_rl/topology.py"),
    "a layer's counts in the group for objects": Plant(
        GLOO, "one", "rl", "megatron_rl/train_step/step.py", "TrainStep._counting",
        "all_reduce(store[layer], group=self.topology.tp_dp_cp_group)",
        "all_reduce(store[layer], group=self.topology.control_group)", "all_reduce(store[layer], group="),
    "the probe's log-probabilities as they are": Plant(
        NUMPY, "one", "rl", "megatron_rl/trainer/probe.py", "Probe.__call__",
        "by_sample(batch, logprobs_T)[0].cpu().numpy()", "by_sample(batch, logprobs_T)[0].numpy()",
        "by_sample(batch, logprobs_T)[0]"),
    "tensors of a checkpoint as they are, in the thread that writes": Plant(
        NUMPY, "one", "sft", "megatron_rl/model/checkpoint_shards.py", "write_tensors",
        "memoryview(tensor.cpu().contiguous().numpy())", "memoryview(tensor.contiguous().numpy())",
        "file.write(memoryview(tensor"),
    "the CPU's random states on every machine": Plant(
        LEAK, "one", "sft", "megatron_rl/compat/megatron_cpu.py", "patch_megatron",
        "if not _installed:", "if False:", "", "megatron/core/tensor_parallel/random.py"),
}
