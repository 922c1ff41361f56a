"""Networks beside the one of cases.py, each with one C3PO step, that pass through every layout which can hold them.

ling has Ling-lite's shape scaled down (64 experts, top-6, two shared, NormHead). bailing_v2 has Ling 2.0's: sigmoid
scores, an expert bias, groups, a scaling factor, half a head that rotates, a layer behind the last. The
others differ from it in what a layout can get wrong: biases interleaved by key-value group, norms inside
tensor-parallel heads, latent vectors that all tensor-parallel ranks have, values narrower than keys, groups ranked by
one expert, an embedding that is also the head on another pipeline stage, no experts at all.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import tests.distributed.cases as cases
from megatron_rl.model.architectures import read_config
from megatron_rl.model.network import Network
from megatron_rl.model.slots import carried, expected_shapes
from tests.distributed.reference_step import Reference, experts_of, fill_logprobs, reference_step, token_outputs
from tests.tiny_models import write_tiny_bailing, write_tiny_known

_SIZES = {key: cases.MODEL[key] for key in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "initializer_range")}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NETWORKS: dict[str, dict] = {
    "ling": {"model_type": "bailing_moe", "norm_head": True, "num_experts": 64, "num_experts_per_tok": 6,
             "num_shared_experts": 2, "moe_intermediate_size": 8},
    "bailing_bias": {"model_type": "bailing_moe", **_EXPERTS, "num_shared_experts": 1, "norm_topk_prob": False,
                     "use_qkv_bias": True, "tie_word_embeddings": True, "head_dim": 12, "rope_theta": 100.0,
                     "rope_scaling": {"type": "linear", "factor": 4.0}},
    "bailing_v2": {"model_type": "bailing_moe_v2", "num_experts": 16, "num_experts_per_tok": 4, "n_group": 4,
                   "topk_group": 2, "num_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
                   "num_nextn_predict_layers": 1},
    "qwen3_moe": {"model_type": "qwen3_moe", **_EXPERTS, "head_dim": 12, "rope_parameters": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}},
    "qwen2_moe": {"model_type": "qwen2_moe", **_EXPERTS, "shared_expert_intermediate_size": 24,
                  "head_dim": 8},
    "glm4_moe": {"model_type": "glm4_moe", "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                 "head_dim": 8, "num_nextn_predict_layers": 1},
    "deepseek_v2": {"model_type": "deepseek_v2", "num_key_value_heads": 4, "n_routed_experts": 8,
                    "num_experts_per_tok": 3, "moe_intermediate_size": 16, "q_lora_rank": 20, "kv_lora_rank": 24,
                    "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16,
                    "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.0,
                    "rope_parameters": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16,
                                        "rope_theta": 100.0, "mscale": 0.7, "mscale_all_dim": 0.9}},
    "deepseek_v3": {"model_type": "deepseek_v3", "num_key_value_heads": 4, "n_routed_experts": 4,
                    "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
}
CHECKPOINT = "checkpoint"
REPLAYED = "_replayed"
"""A network with this ending is told which experts its tokens take."""
NETWORKS |= {name + REPLAYED: NETWORKS[name] for name in ("bailing_v2", "deepseek_v2")}
_FEW = ("one", "tp2_ep2", "pp2_vpp2", "cp2")
ONLY_IN = {f"bailing_v2{REPLAYED}": _FEW[1:], f"deepseek_v2{REPLAYED}": ("tp2_ep2",), "glm4_moe": _FEW,
           "deepseek_v3": _FEW}
"""Networks that go through some layouts only; other rows have each of their parts in all layouts."""
MTP_NETWORKS = ("bailing_v2", "glm4_moe")
"""Those with a layer behind the last, which model.mtp trains."""
MTP_LAYOUTS = ("one", "dp2", "ep2", "tp2", "tp2_ep2", "tp2_etp2", "cp2", "tp2_dp2_ep2", "tp2_cp2_ep2")
MTP_WITH_VARIANTS = ("dp2", "tp2_ep2")
"""Where each of cases.VARIANTS takes a step too."""
BIAS_RATE = 0.01
SERVED = ("ling", "bailing_v2", "qwen3_moe", "glm4_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3")
"""By a real engine, in tests/engine/test_networks.py."""


def networks_in(layout: str) -> list[str]:
    """Those that the layout can hold: a dense network has no experts to spread."""
    spreads_experts = any(cases.LAYOUTS[layout].get(size, 1) > 1 for size in ("ep", "etp"))
    return [name for name, keys in NETWORKS.items() if ("num_experts_per_tok" in keys or not spreads_experts)
            and layout in ONLY_IN.get(name, (layout,))]


class WrittenNetwork:
    """One of NETWORKS in folder/name: checkpoint/ and its step.

    config: the parsed config.json. weights: the tensors that are built. behind: those of the layer behind the last.
    """

    def __init__(self, folder: Path, name: str):
        keys = {**_SIZES, **NETWORKS[name]}
        model_type = keys.pop("model_type")
        self.checkpoint = folder / name / CHECKPOINT
        if model_type.startswith("bailing_moe"):
            write_tiny_bailing(self.checkpoint, model_type, seed=7, **keys)
        else:
            write_tiny_known(self.checkpoint, model_type, seed=7, **keys)
        self.config = json.loads((self.checkpoint / "config.json").read_text())
        network = read_config(self.checkpoint)
        tensors = load_file(self.checkpoint / "model.safetensors")
        self.weights = {key: tensors[key] for key in tensors.keys() - carried(network, tensors)}
        self.behind = {key: tensors[key] for key in expected_shapes(network, mtp=True) if key not in self.weights} \
            if network.num_nextn_predict_layers else {}
        self.step = cases.draw_sequences()
        if name.endswith(REPLAYED):
            self.step.routed_experts = random_experts(self.step, network)
        fill_logprobs(self.step, {name: tensor.double() for name, tensor in self.weights.items()}, self.config)
        torch.save(self.step, folder / name / "step.pt")

    @cached_property
    def loads(self) -> list[torch.Tensor]:
        """Choices of each expert by all of the step's tokens, fp64 [E] for every MoE layer."""
        weights = {name: tensor.double() for name, tensor in self.weights.items()}
        with torch.no_grad():
            routes = [token_outputs(weights, self.config, tokens, experts)[3] for tokens, experts in zip(
                self.step.token_ids, experts_of(self.step), strict=True)]
        return [torch.cat(layer).flatten().bincount(minlength=read_config(self.checkpoint).num_experts).double()
                for layer in zip(*routes, strict=True)]

    @cached_property
    def reference(self) -> Reference:
        return reference_step(self.step, self.weights, self.config)


def random_experts(step: cases.Step, network: Network, seed: int = 6) -> list[np.ndarray]:
    """int64 [L-1, M, top-k] of each sequence, distinct for a token."""
    rng = np.random.default_rng(seed)
    return [rng.random((length, network.num_moe_layers, network.num_experts)).argsort(-1)
            [..., :network.num_experts_per_tok] for length in step.lengths]
