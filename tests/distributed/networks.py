"""Networks beside the one of cases.py, each with one C3PO step, that pass through every layout which can hold them.

ling has Ling-lite's shape scaled down (64 experts, top-6, two shared, NormHead). The others differ from it in what a
layout can get wrong: biases interleaved by key-value group, norms inside tensor-parallel heads, an embedding that is
also the head on another pipeline stage, no experts at all.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

import tests.distributed.cases as cases
from tests.distributed.reference_step import Reference, fill_logprobs, reference_step
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
    "qwen3_moe": {"model_type": "qwen3_moe", **_EXPERTS, "head_dim": 12, "rope_parameters": {
        "rope_type": "default", "rope_theta": 100.0}},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
}
CHECKPOINT = "checkpoint"
SERVED = ("ling", "qwen3_moe")  # by a real engine, in tests/engine/test_networks.py


def networks_in(layout: str) -> list[str]:
    """Those that the layout can hold: a dense network has no experts to spread."""
    spreads_experts = any(cases.LAYOUTS[layout].get(size, 1) > 1 for size in ("ep", "etp"))
    return [name for name, keys in NETWORKS.items() if "num_experts" in keys or not spreads_experts]


class WrittenNetwork:
    """One of NETWORKS in folder/name: checkpoint/ and its step. config: the parsed config.json."""

    def __init__(self, folder: Path, name: str):
        keys = {**_SIZES, **NETWORKS[name]}
        model_type = keys.pop("model_type")
        self.checkpoint = folder / name / CHECKPOINT
        if model_type == "bailing_moe":
            write_tiny_bailing(self.checkpoint, seed=7, **keys)
        else:
            write_tiny_known(self.checkpoint, model_type, seed=7, **keys)
        self.config = json.loads((self.checkpoint / "config.json").read_text())
        self.weights = load_file(self.checkpoint / "model.safetensors")
        self._step = cases.draw_sequences()
        fill_logprobs(self._step, {name: tensor.double() for name, tensor in self.weights.items()}, self.config)
        torch.save(self._step, folder / name / "step.pt")

    @cached_property
    def reference(self) -> Reference:
        return reference_step(self._step, self.weights, self.config)
