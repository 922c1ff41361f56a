"""What each tensor-parallel rank of an engine holds, as SGLang's own classes load it, is what we predict."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.model.architectures import read_config
from megatron_rl.sync.verify import EngineLayout, ExpectedChecksums
from tests.tiny_models import write_tiny_bailing, write_tiny_known

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 128,
         "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
"""Two heads of keys: four ranks hold each of them twice. The vocabulary is padded to 128 rows."""
CASES = [("bailing_moe", 2), ("bailing_moe", 4), ("qwen3_moe", 2), ("qwen3_moe", 4), ("qwen2_moe", 2)]
"""Query, key and value in one tensor, with a dense layer, shared experts and a NormHead; apart, with norms; and a
shared expert of a width of its own."""


@pytest.mark.parametrize(("family", "tp"), CASES)
def test_every_rank_holds_what_is_predicted(tmp_path, family, tp):
    write, options = (write_tiny_bailing, {"norm_head": True, "first_k_dense_replace": 1}) \
        if family == "bailing_moe" else (write_tiny_known, {})
    folder = write(tmp_path / "model", family, **SIZES, **options)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.engine.tensor_parallel_loader", str(folder), str(tp)],
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    held = json.loads(done.stdout.splitlines()[-1])
    expected = ExpectedChecksums(asdict(read_config(folder)), engine_dtype=torch.float32,
                                 layout=EngineLayout("cpu", tp))
    for _ in expected.watch(load_file(folder / "model.safetensors").items()):
        pass
    predicted = expected.digests()
    assert len(held) == len(predicted) == tp
    for rank in range(tp):
        assert predicted[rank] == held[rank]
    assert held[0] != held[1]
