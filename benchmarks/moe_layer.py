"""One MoE layer of Megatron's, as the benchmarks of its parts take it apart."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks import workload


def build(config: dict):
    """(the layer's MoELayer, its Network) of a one-layer model with the widths of `config`; starts one process."""
    workload.set_environment()
    from megatron_rl import topology
    from megatron_rl.config.schema import ModelConfig, ParallelConfig
    from megatron_rl.model.architectures import read_config
    from megatron_rl.model.build import build_policy
    from megatron_rl.model.convert import load_hf

    here = topology.start(ParallelConfig(), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        path = workload.write_model(Path(folder) / "model", config | {"num_hidden_layers": 1})
        network = read_config(path)
        policy = build_policy(network, ModelConfig(path=str(path)), ParallelConfig(), with_gradients=False)
        load_hf(policy, here, path)
    layer = policy.gpt_models[0].decoder.layers[0].mlp
    layer.requires_grad_(True)
    return layer, network


def hidden_states(tokens: int, hidden: int) -> torch.Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1)).requires_grad_()
