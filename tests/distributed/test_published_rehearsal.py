"""Published networks of every kind of router, built rank by rank on fake tensors: their parameters are all there."""

from __future__ import annotations

import json

import pytest

from megatron_rl.config.load import load
from megatron_rl.model.architectures import HF_FILES, parse_config
from megatron_rl.model.slots import count_parameters, frozen_names
from tests.distributed.all_ranks import parameters_of_all_ranks

pytestmark = pytest.mark.slow
LAYOUTS = {"ling_mini_2": {"ep": 64}, "ling_flash_2": {"ep": 64}, "ling_1t": {"ep": 64, "pp": 4},
           "glm_4_5_air": {"ep": 64}, "qwen1_5_moe_a2_7b": {"ep": 4}, "qwen3_30b_a3b": {"ep": 64},
           "deepseek_v2": {"ep": 32, "tp": 2}, "moonlight_16b_a3b": {"ep": 64}}
"""On 256 ranks."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_of_a_published_network_hold_its_parameters_once(name):
    config = load(["experiment=ring_lite_rl_stage1",
                   *(f"parallel.{key}={size}" for key, size in LAYOUTS[name].items())])
    network = parse_config(json.loads((HF_FILES / f"{name}.json").read_text()), name)
    biases = network.num_experts * len(frozen_names(network))  # they are buffers
    assert parameters_of_all_ranks(config, network) + biases == count_parameters(network)[0]
