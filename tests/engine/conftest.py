"""One SGLang server on CPU for all engine tests, serving a tiny random BailingMoe.

The model is awkward on purpose: NormHead, a dense first layer, two shared experts, an expert width and a
vocabulary that SGLang pads.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from megatron_rl.config.rollout import ENGINE_KEY, EngineConfig, RolloutConfig
from megatron_rl.recipes.quickstart import make_random_model
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.sampling import GenerateResult, SamplingParams
from megatron_rl.sync.publish import Publisher
from megatron_rl.sync.tensor import TensorPublisher
from megatron_rl.sync.verify import EngineLayout, ExpectedChecksums, verify_engines
from tests.reference_bailing import response_logprobs
from tests.tiny_models import tiny_bailing_weights, write_tiny_bailing

ROLLOUT = RolloutConfig(
    prompts_per_step=4,
    responses_per_prompt=3,
    max_response_tokens=16,
    max_context_tokens=512,
    concurrency=16,
    request_timeout_s=300.0,
    retries=1,
    engine=EngineConfig(max_running_requests=32, max_total_tokens=8192, start_timeout_s=600.0),
)
PROMPTS = ((5, 6, 7), (8, 9), (10, 11, 12, 13), (14, 15, 16, 17, 18))


ATTEMPTS = 10


def client_of(url: str, **options) -> EngineClient:
    """The client of one of the tests' engines, which all have one key (tests/conftest.py)."""
    return EngineClient(url, api_key=os.environ[ENGINE_KEY], **options)


async def running(client: EngineClient, prompt: Sequence[int], *, rid: str,
                  sampling: SamplingParams) -> asyncio.Task[GenerateResult]:
    """A request that the engine was seen to decode, named by its id; asked again should it end before that, since this
    process may be held up for longer than a fast engine takes."""
    for attempt in range(ATTEMPTS):
        name = f"{rid}-{attempt}."
        request = asyncio.create_task(client.generate(prompt, rid=name, sampling=sampling), name=name)
        if await seen_to_run(client, request):
            return request
        await request
    raise AssertionError(f"request {rid} was never seen to run")


async def seen_to_run(client: EngineClient, work: asyncio.Task) -> bool:
    """Returns once the engine decodes; False if `work` is done before that."""
    while not work.done():
        loads = (await client._request("GET", "/v1/loads?include=core", None))["loads"]
        if any(load["num_running_reqs"] for load in loads):
            return True
        await asyncio.sleep(0.005)
    return False


def in_time[Outcome](attempt: Callable[[], Outcome], was_in_time: Callable[[Outcome], bool]) -> Outcome:
    """The outcome of the first attempt that came while the engine was still at work."""
    for _ in range(ATTEMPTS):
        outcome = attempt()
        if was_in_time(outcome):
            return outcome
    raise AssertionError(f"the engine had always ended before: {outcome}")


class LiveEngine:
    """The shared server together with the weights that it is meant to serve."""

    def __init__(self, process: EngineProcess, folder: Path, draw=tiny_bailing_weights, *,
                 dtype: torch.dtype = torch.float32, device: str = "cpu"):
        """draw(config, seed=...): weights under their checkpoint names; those of the folder without a seed."""
        self.process = process
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.client = client_of(process.base_url, timeout_s=300.0)
        self._draw = draw
        self.weights = self.first_weights()
        self.version = 0
        self.expected = ExpectedChecksums(self.config, engine_dtype=dtype, layout=EngineLayout(device))
        self._seeds = itertools.count(1)

    def first_weights(self) -> dict[str, torch.Tensor]:
        """Those that the server started with."""
        return self._draw(self.config)

    def new_weights(self) -> dict[str, torch.Tensor]:
        return self._draw(self.config, seed=next(self._seeds))

    def publish(self, weights: Mapping[str, torch.Tensor], publisher: Publisher | None = None) -> None:
        """Publishes under the next version and checks the checksums."""
        publisher = publisher or TensorPublisher([self.client], bucket_bytes=1 << 20)
        publisher.publish(self.expected.watch(weights.items()), self.version + 1)
        self.weights, self.version = dict(weights), self.version + 1
        verify_engines([self.client], self.expected)

    def call(self, coroutine):
        """Runs one client call to its end."""

        async def call_and_close():
            try:
                return await coroutine
            finally:
                await self.client.close()

        return asyncio.run(call_and_close())

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[GenerateResult]:
        async def generate_all() -> list[GenerateResult]:
            return await asyncio.gather(*(
                self.client.generate(prompt, rid=f"test-{number}", sampling=sampling)
                for number, prompt in enumerate(prompts)))

        return self.call(generate_all())

    def largest_error(
        self, prompts: Sequence[Sequence[int]], results: Sequence[GenerateResult], *, temperature: float = 1.0,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> float:
        """Largest difference between the engine's log-probabilities and the reference's."""
        errors = [
            (response_logprobs(weights or self.weights, self.config, prompt, result.output_ids.tolist(),
                               temperature=temperature) - torch.from_numpy(result.logprobs)).abs().max().item()
            for prompt, result in zip(prompts, results, strict=True)
        ]
        return max(errors)


@pytest.fixture(scope="session")
def quickstart_model(tmp_path_factory) -> Path:
    """What the quick start, an ablation's supervised start and the tiny pipeline begin with."""
    folder = tmp_path_factory.mktemp("quickstart") / "init"
    make_random_model(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """What the quick start begins with, at half the depth, for whole runs."""
    folder = tmp_path_factory.mktemp("model") / "init"
    make_random_model(folder, seed=0, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bailing(
        tmp_path_factory.mktemp("model") / "tiny", norm_head=True, num_hidden_layers=3, first_k_dense_replace=1,
        intermediate_size=100, moe_intermediate_size=24, num_shared_experts=2)


@pytest.fixture(scope="session")
def live_engine(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveEngine]:
    log_path = tmp_path_factory.mktemp("engine") / "engine.log"
    with EngineProcess.from_config(ROLLOUT, model_folder, log_path=log_path, return_routed_experts=True) as process:
        yield LiveEngine(process, model_folder)
