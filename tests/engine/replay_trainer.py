"""What a trainer makes of an engine's responses, with and without the engine's experts; behind test_router_replay.py.

`python -m tests.engine.replay_trainer FOLDER DTYPE`: FOLDER holds model/ and samples.pt (TrainSamples), and gets
result.pt. A process of its own, because Megatron's groups belong to one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from c3po import mismatch_diagnostics
from megatron_rl import topology
from megatron_rl.batch import pack
from megatron_rl.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.model.architectures import read_config
from megatron_rl.model.build import build_policy
from megatron_rl.model.convert import load_hf
from megatron_rl.model.router import BudgetRouter
from megatron_rl.train_step.optimizer import build_optimizer
from megatron_rl.train_step.step import TrainStep


def main(folder: Path, dtype: str) -> None:
    parallel = ParallelConfig(distributed_optimizer=False)
    here = topology.start(parallel, seed=0)
    network = read_config(folder / "model")
    policy = build_policy(network, ModelConfig(path=str(folder / "model"), dtype=dtype), parallel, with_gradients=True)
    load_hf(policy, here, folder / "model")
    step = TrainStep(policy, build_optimizer(policy, OptimizerConfig(), parallel), here, temperature=1.0,
                     chunk_tokens=512)
    samples = torch.load(folder / "samples.pt", weights_only=False)
    routers = [module for module in policy.gpt_models[0].modules() if isinstance(module, BudgetRouter)]
    taken: dict[int, list[torch.Tensor]] = {}
    for layer, router in enumerate(routers):
        router.register_forward_hook(
            lambda _, __, out, layer=layer: taken.setdefault(layer, []).append(out[1].clone()))

    def loss(batch, logprobs_T, entropy_T):
        return -(logprobs_T * batch.loss_mask).sum() / 1000, {}

    result = {}
    for name, shape in (("live", None), ("replayed", (network.num_moe_layers, network.num_experts_per_tok))):
        batches = [pack(samples[start::2], multiple_of=1, experts_shape=shape) for start in range(2)]
        taken.clear()
        old, counts = step.count_routing(batches)
        gap = [mismatch_diagnostics(logprobs, batch.rollout_logprobs, batch.loss_mask)[0]
               for logprobs, batch in zip(old, batches, strict=True)]
        total = {key: gap[0][key] + gap[1][key] for key in gap[0]}
        result[name] = {key: float(value.sum / value.count) for key, value in total.items()}
        result[name]["routing"] = torch.stack([torch.cat(taken[layer]) for layer in range(len(routers))], 1)
        step.backward(batches, loss, balance_coef=0.0, z_loss_coef=0.0, counts=counts)
        result[name]["router_gradients"] = [float(router.weight.main_grad.norm()) for router in routers]
        result[name]["sums"] = {key: (value.sum, value.count) for key, value in step._metrics()[0].items()}
    torch.save(result, folder / "result.pt")
    topology.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
