"""The rotation's scaling is that of transformers and of SGLang, and what only one of them reads is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rl.model.architectures import parse_config
from megatron_rl.model.attention import rotation
from megatron_rl.model.families import FAMILIES
from megatron_rl.model.rope import inverse_frequencies, read_rope

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "llama3-published": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    "yarn": YARN,
    "yarn-mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5},
    "yarn-one_mscale": {**YARN, "mscale": 0.707},
    "yarn-betas": {**YARN, "beta_fast": 8, "beta_slow": 2.0, "truncate": False},
    "yarn-no_stretch": {**YARN, "factor": 1.0},
    "yarn-short": {**YARN, "original_max_position_embeddings": 4},  # both ends of the ramp are the first pair
}
DIM, THETA, POSITIONS = 64, 10000.0, 200
in_scalings = pytest.mark.parametrize("name", SCALINGS)
SGLANG = f"""
import json, sys, torch
from megatron_rl.compat.sglang_cpu import apply
apply()
from sglang.srt.layers.rotary_embedding import get_rope
tables = {{name: get_rope({DIM}, {DIM}, 8192, {THETA}, True, rope, torch.float32).cos_sin_cache
          for name, rope in json.loads(sys.argv[2]).items()}}
torch.save({{name: table[:{POSITIONS}].clone() for name, table in tables.items()}}, sys.argv[1])
"""


def network_with(rope: dict):
    return parse_config({"model_type": "llama", **FAMILIES["llama"].tiny, "head_dim": DIM,
                         "rope_parameters": {**rope, "rope_theta": THETA}}, "here")


@in_scalings
def test_frequencies_are_those_of_transformers(name):
    config = LlamaConfig(head_dim=DIM, max_position_embeddings=8192, rope_parameters={
        **SCALINGS[name], "rope_theta": THETA})
    expected, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")
    scaling = read_rope({"rope_scaling": SCALINGS[name]}, "here")[1]
    assert scaling.attention_factor == pytest.approx(factor, rel=1e-12)
    torch.testing.assert_close(inverse_frequencies(scaling, THETA, DIM), expected, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_cosines_and_sines_are_those_of_the_engine(tmp_path):
    subprocess.run([sys.executable, "-W", "ignore", "-c", SGLANG, str(tmp_path / "tables.pt"), json.dumps(SCALINGS)],
                   check=True, timeout=300)
    tables = torch.load(tmp_path / "tables.pt")
    assert tables.keys() == SCALINGS.keys()
    for name, rope in SCALINGS.items():
        cosine, sine = (table[:, 0, :DIM // 2] for table in rotation(torch.arange(POSITIONS), network_with(rope)))
        rows = len(tables[name])  # the engine makes no more than it would need
        torch.testing.assert_close(torch.cat([cosine, sine], -1)[:rows], tables[name], rtol=0, atol=3e-5, msg=name)


@in_scalings
def test_a_scaling_written_down_is_read_back(name):
    scaling = read_rope({"rope_scaling": SCALINGS[name]}, "here")[1]
    assert read_rope({"rope_scaling": scaling.as_config()}, "here")[1] == scaling


@pytest.mark.parametrize(("rope", "message"), [
    ({**YARN, "attention_factor": 1.2}, "rope_scaling.attention_factor=1.2 is not supported: only transformers reads"),
    ({**YARN, "attn_factor": 1.2}, "rope_scaling.attn_factor=1.2 is not supported: only SGLang reads it"),
    ({**YARN, "extrapolation_factor": 2}, "rope_scaling.extrapolation_factor=2 is not supported: only SGLang reads it"),
    ({**YARN, "mscale": 1.0, "mscale_all_dim": 0}, "rope_scaling.mscale=1.0 with mscale_all_dim=0.0 is not supported"),
    ({**YARN, "original_max_position_embeddings": None}, "rope_scaling.original_max_position_embeddings=null must be"),
    ({**YARN, "factor": None}, "rope_scaling.factor=null must be a number of at least 1.0"),
    ({**YARN, "factor": 0.5}, "rope_scaling.factor=0.5 must be a number of at least 1.0"),
    ({**YARN, "beta_fast": None}, "rope_scaling.beta_fast=null must be a number"),
    ({**YARN, "beta_fast": 1, "beta_slow": 2}, "rope_scaling.beta_fast=1.0 must be above beta_slow=2.0"),
    ({**YARN, "truncate": 1}, "rope_scaling.truncate=1 must be bool"),
    ({**YARN, "low_freq_factor": 1.0}, "low_freq_factor=1.0 in the rotation's parameters is not supported; only .*"),
    ({**LLAMA3, "low_freq_factor": 4.0}, "rope_scaling.low_freq_factor=4.0 must be below high_freq_factor=4.0"),
    ({**LLAMA3, "high_freq_factor": None}, "rope_scaling.high_freq_factor=null must be a number"),
    ({**LLAMA3, "beta_fast": 32}, "beta_fast=32 in the rotation's parameters is not supported; only .* llama3"),
    ({"rope_type": "linear", "factor": 4}, "rope_scaling.factor=4 must be a float"),
    ({"rope_type": "longrope", "factor": 4.0}, "rope_scaling=.* is not supported; only null, linear, llama3 and yarn"),
])
def test_what_engine_and_checkpoint_would_take_otherwise_is_refused_by_its_key(rope, message):
    with pytest.raises(ValueError, match=f"^here: {message}"):
        network_with(rope)


def test_a_second_length_of_pretraining_is_refused():
    with pytest.raises(ValueError, match="^here: original_max_position_embeddings=64 is not supported beside"):
        read_rope({"rope_scaling": YARN, "original_max_position_embeddings": 64}, "here")
