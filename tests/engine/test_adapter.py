"""Adapters sent alone (rollout.publish=adapter): to one engine, and in RL through the command line."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.config.lora import LoraConfig
from megatron_rl.config.schema import ModelConfig
from megatron_rl.model.adapter_folder import peft_config, peft_tensors
from megatron_rl.model.adapters import adapted_modules, adapter_slots, matrix_slots
from megatron_rl.model.architectures import read_config
from megatron_rl.observe.jsonl import read_jsonl
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.connection import RequestRefusedError
from megatron_rl.rollout.engine_command import engine_command
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.sync.adapter import AdapterPublisher
from megatron_rl.sync.publish import PublishError
from megatron_rl.sync.tensor import TensorPublisher
from tests.engine.conftest import ROLLOUT, client_of
from tests.engine.test_lora import OPTIONS, in_two_layouts
from tests.engine.test_runs import SMALL
from tests.tiny_models import write_tiny_known

TOKENS = list(range(3, 40))
ATTENTION = ("linear_qkv", "linear_proj")


class Adapted:
    """An engine that serves a tiny random network of a family, and random adapters beside it."""

    def __init__(self, family: str, folder: Path, lora: LoraConfig):
        self.folder = write_tiny_known(folder / "base", family)
        self.network, self.lora = read_config(self.folder), lora
        self.process = EngineProcess.from_config(
            ROLLOUT, self.folder, log_path=folder / "engine.log",
            adapters=(lora.rank, sorted(adapted_modules(self.network, lora))))
        self.client = client_of(self.process.base_url, timeout_s=300.0)
        self.publisher = AdapterPublisher(
            [client_of(self.process.base_url, timeout_s=300.0)],
            config=peft_config(ModelConfig(path=str(self.folder), lora=lora), self.network))

    def matrices(self, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: 0.3 * torch.randn(shape, generator=generator)
                for slot in matrix_slots(self.network, self.lora).values() for name, shape in slot.shapes.items()}

    def merged(self, matrices: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights = load_file(self.folder / "model.safetensors")
        for each in adapter_slots(self.network, self.lora):
            for name, b in zip(each.base.names, each.b.names, strict=True):
                weights[name] = weights[name] + self.lora.scale * matrices[b] @ matrices[each.a.key]
        return weights

    def publish(self, matrices: dict[str, torch.Tensor], version: int) -> str:
        self.publisher.publish(peft_tensors(self.lora, self.network, matrices.items()).items(), version)
        return self.publisher.name

    def call(self, coroutine):
        async def call_and_close():
            try:
                return await coroutine
            finally:
                await self.client.close()

        return asyncio.run(call_and_close())

    def logprobs(self, adapter: str | None) -> np.ndarray:
        self.client.adapter = adapter
        return self.call(self.client.input_logprobs(TOKENS, rid="test."))


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3_moe"])
def engine(request, tmp_path_factory):
    """Beside all of a dense network, and beside the attention of one with experts."""
    dense = request.param != "qwen3_moe"
    lora = LoraConfig(rank=4, alpha=8.0) if dense else LoraConfig(rank=4, alpha=8.0, targets=ATTENTION)
    adapted = Adapted(request.param, tmp_path_factory.mktemp("adapted"), lora)
    with adapted.process:
        yield adapted


@pytest.mark.slow
def test_an_engine_with_an_adapter_answers_as_with_the_merged_weights(engine):
    base, checksums = engine.logprobs(None), engine.call(engine.client.checksums())
    first, second = engine.matrices(1), engine.matrices(2)
    old = engine.publish(first, 1)
    answers = [engine.logprobs(old)]
    new = engine.publish(second, 2)
    answers.append(engine.logprobs(new))
    assert engine.call(engine.client.weight_version()) == 2
    assert np.array_equal(engine.logprobs(None), base), "a request that names no adapter gets the base's answer"
    assert engine.call(engine.client.checksums()) == checksums, "the weights stayed as they were"
    assert engine.call(engine.client.adapters()) == [new], "the earlier one is gone"
    with pytest.raises(RequestRefusedError):
        engine.logprobs(old)
    weights = TensorPublisher([client_of(engine.process.base_url, timeout_s=300.0)], bucket_bytes=1 << 20)
    for version, (matrices, answer) in enumerate(zip((first, second), answers, strict=True), start=3):
        weights.publish(engine.merged(matrices).items(), version)
        assert np.abs(engine.logprobs(None) - answer).max() < 1e-4 < 0.1 < np.abs(base - answer).max()


@pytest.mark.slow
def test_a_matrix_that_changes_on_its_way_is_never_served(engine, monkeypatch):
    load = EngineClient.load_adapter

    async def spoiled(client, name, config, pickled, checksums, *, version):
        await load(client, name, config, pickled, dict.fromkeys(checksums, "0" * 64), version=version)

    monkeypatch.setattr(EngineClient, "load_adapter", spoiled)
    with pytest.raises(PublishError, match="publishing version 9: bucket 0"):
        engine.publish(engine.matrices(3), 9)
    assert "adapter sync MISMATCH" in engine.process.log_path.read_text()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Two steps on one rank, and one more on two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("run")
    return in_two_layouts(write_tiny_known(folder / "base", "qwen3"), folder / "run", *SMALL, *OPTIONS,
                          "rollout.publish=adapter", "parallel=single")


@pytest.mark.slow
def test_engines_sample_with_the_adapters_that_they_are_sent(run_dir):
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["sync/engines_verified"] == 1, "the weights beside which the adapter stands"
        assert row["sync/probe_max_abs"] < 1e-4 and row["mismatch/max_abs"] < 1e-4
    assert rows[0]["train/kl"] == pytest.approx(0.0, abs=1e-10) and rows[-1]["train/kl"] > 1e-6, "adapters train"


@pytest.mark.slow
def test_a_publish_sends_the_bytes_of_the_adapter_folder(run_dir):
    folder = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    sent = {row["sync/bytes"] for row in read_jsonl(run_dir / "metrics.jsonl")}
    assert sent == {sum(matrix.nbytes for matrix in folder.values())}


def test_engines_are_started_for_the_rank_and_the_modules():
    argv, _ = engine_command(replace(ROLLOUT.engine, device="cpu"), ROLLOUT, "model", 1234,
                             adapters=(8, ["o_proj", "q_proj"]))
    flags = " ".join(argv)
    for expected in ("--enable-lora", "--lora-target-modules o_proj q_proj", "--max-lora-rank 8",
                     "--lora-backend torch_native"):
        assert expected in flags
