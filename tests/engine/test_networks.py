"""SGLang serves what the trainer exports, with the trainer's log-probabilities: Ling, Qwen3-MoE and DeepSeek."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rl.config.rollout import ENGINE_KEY
from megatron_rl.rollout.engines import EngineProcess
from tests.distributed import cases
from tests.distributed.conftest import run_worker
from tests.distributed.networks import SERVED, WrittenNetwork
from tests.engine.conftest import ROLLOUT

LAYOUT = "ep2"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME/export of each network, written by two expert-parallel ranks, and their log-probabilities."""
    folder = tmp_path_factory.mktemp("exported")
    for name in SERVED:
        WrittenNetwork(folder, name)
    run_worker(("tests.distributed.worker", "exports"), folder, cases.LAYOUTS[LAYOUT]["world_size"], [LAYOUT])
    return folder


def score(base_url: str, tokens: list[int]) -> np.ndarray:
    """The engine's log-probability of each token but the first, given those before it, [L-1]."""
    body = {"input_ids": tokens, "return_logprob": True, "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0}}
    request = urllib.request.Request(f"{base_url}/generate", json.dumps(body).encode(),
                                     {"Content-Type": "application/json",
                                      "Authorization": f"Bearer {os.environ[ENGINE_KEY]}"})
    with urllib.request.urlopen(request, timeout=300) as response:
        scored = json.load(response)["meta_info"]["input_token_logprobs"]
    assert [token for _, token, _ in scored] == tokens
    return np.array([logprob for logprob, _, _ in scored[1:]])


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_engine_serving_the_export_gives_the_trainers_logprobs(exported: Path, name: str, tmp_path: Path):
    trainer = torch.load(exported / f"{LAYOUT}.exports.pt")[name]
    # SGLang names the vocabulary's last token 0 in this answer (logprob_result_processor.py)
    sequences = {index: tokens for index, tokens in enumerate(cases.draw_sequences().token_ids)
                 if cases.MODEL["vocab_size"] - 1 not in tokens}
    assert len(sequences) >= 5
    with EngineProcess.from_config(ROLLOUT, exported / name / "export", log_path=tmp_path / "engine.log") as process:
        errors = [np.abs(score(process.base_url, tokens.tolist()) - trainer[index].numpy()).max()
                  for index, tokens in sequences.items()]
    assert max(errors) < 1e-4
    assert min(float(trainer[index].std()) for index in trainer) > 0.1  # not a uniform model
