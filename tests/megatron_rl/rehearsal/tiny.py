"""A network of two layers, and its step rehearsed, for the tests of this folder."""

from __future__ import annotations

from megatron_rl.config.load import build
from megatron_rl.config.schema import Config
from megatron_rl.model.architectures import parse_config
from megatron_rl.model.families import FAMILIES
from megatron_rl.model.fresh import bailing_config
from megatron_rl.rehearsal.roofline import Rates
from megatron_rl.rehearsal.step import Workload, rehearse
from megatron_rl.rehearsal.summary import summary

NETWORK = parse_config(
    {**bailing_config(**FAMILIES["bailing_moe"].tiny), "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96,
     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8,
     "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    "the tests' network")
WORKLOAD = Workload((48, 48), 1)


def tiny_config(**parallel) -> Config:
    return build({"parallel": parallel, "algo": {"balance_coef": 0.01}, "model": {"dtype": "bfloat16"},
                  "rollout": {"max_context_tokens": 64, "max_response_tokens": 48},
                  "batch": {"tokens_per_microbatch": 96}})


def rehearsed(config: Config, rank: int = 0, workload: Workload = WORKLOAD, imbalance: float = 1.0) -> dict:
    """Its summary."""
    return summary(config, NETWORK, workload, rehearse(config, NETWORK, rank, workload, imbalance=imbalance),
                   Rates())
