"""Published weights arrive, whichever way they travel, and whatever does not arrive is noticed."""

from __future__ import annotations

import dataclasses
import itertools
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.config.rollout import ENGINE_KEY
from megatron_rl.model.architectures import read_config
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.connection import EngineHTTPError
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.ports import choose_port
from megatron_rl.rollout.sampling import SamplingParams
from megatron_rl.sync.broadcast import BroadcastPublisher
from megatron_rl.sync.buckets import make_buckets
from megatron_rl.sync.disk import DiskPublisher
from megatron_rl.sync.publish import Publisher, PublishError
from megatron_rl.sync.tensor import TensorPublisher
from megatron_rl.sync.verify import ExpectedChecksums, WeightMismatchError, verify_engines
from tests.engine.conftest import PROMPTS, ROLLOUT, LiveEngine
from tests.reference_bailing import response_logprobs
from tests.tiny_models import write_tiny_bailing, write_tiny_known

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=12, ignore_eos=True)
SMALL_BUCKET = 100_000


@pytest.fixture(params=["tensor", "broadcast", "disk"])
def publisher(request: pytest.FixtureRequest, live_engine: LiveEngine, tmp_path: Path):
    clients = [live_engine.client]
    made: Publisher = {
        "tensor": lambda: TensorPublisher(clients, bucket_bytes=SMALL_BUCKET),
        "broadcast": lambda: BroadcastPublisher(clients, bucket_bytes=SMALL_BUCKET, backend="gloo", device="cpu"),
        "disk": lambda: DiskPublisher(clients, bucket_bytes=SMALL_BUCKET, folder=tmp_path / "weights",
                                      config_folder=live_engine.folder),
    }[request.param]()
    yield made
    made.close()


def test_a_model_smaller_than_a_bucket_takes_memory_of_its_own_size(live_engine: LiveEngine):
    class Measured(TensorPublisher):
        made: list[int] = []

        def _new_buffer(self, num_bytes: int) -> torch.Tensor:
            self.made.append(num_bytes)
            return super()._new_buffer(num_bytes)

    publisher = Measured([live_engine.client], bucket_bytes=1 << 44)
    live_engine.publish(live_engine.new_weights(), publisher)
    assert publisher.made == [sum(tensor.nbytes for tensor in live_engine.weights.values())]


def test_engine_serves_the_published_weights(live_engine: LiveEngine, publisher: Publisher):
    for _ in range(2):
        old, new = live_engine.weights, live_engine.new_weights()
        live_engine.publish(new, publisher)
        results = live_engine.generate(PROMPTS, SAMPLING)
        assert live_engine.largest_error(PROMPTS, results) < 1e-4
        assert live_engine.largest_error(PROMPTS, results, weights=old) > 1e-3
        assert {span.version for result in results for span in result.weight_versions} == {live_engine.version}
        assert live_engine.call(live_engine.client.weight_version()) == live_engine.version


def test_a_model_without_shared_experts_is_served_and_proven(tmp_path: Path):
    """SGLang holds a shared expert of width 0 for it (bailing_moe.py: BailingMoESparseMoeBlock)."""
    folder = write_tiny_bailing(tmp_path / "model", num_shared_experts=0)
    with EngineProcess.from_config(ROLLOUT, folder, log_path=tmp_path / "engine.log") as process:
        engine = LiveEngine(process, folder)
        old, new = engine.weights, engine.new_weights()
        assert not any("shared" in name for name in new)
        engine.publish(new)
        results = engine.generate(PROMPTS, SAMPLING)
        assert engine.largest_error(PROMPTS, results) < 1e-4 < 1e-3 < engine.largest_error(
            PROMPTS, results, weights=old)
        with pytest.raises(WeightMismatchError, match="parameters differ"):
            verify_engines([engine.client], other_weights(engine))


def test_router_and_expert_bias_in_float32_are_proven_in_a_bfloat16_engine(tmp_path: Path):
    """bailing_moe_v2: SGLang keeps both in float32 whatever its dtype is (bailing_moe.py: BailingMoEGate)."""
    folder = write_tiny_bailing(tmp_path / "model", "bailing_moe_v2", torch_dtype="bfloat16")
    options = dataclasses.replace(ROLLOUT, engine=dataclasses.replace(ROLLOUT.engine, dtype="bfloat16"))
    with EngineProcess.from_config(options, folder, log_path=tmp_path / "engine.log") as process:
        engine = LiveEngine(process, folder)
        engine.expected = ExpectedChecksums(engine.config, engine_dtype=torch.bfloat16)
        new = engine.new_weights()
        assert new["model.layers.0.mlp.gate.expert_bias"].dtype == torch.float32
        engine.publish(new)
        unbiased = {name: torch.zeros_like(t) if name.endswith("expert_bias") else t for name, t in new.items()}
        for _ in engine.expected.watch(unbiased.items()):
            pass
        with pytest.raises(WeightMismatchError, match="2 parameters differ: model.layers.0.mlp.gate.expert_bias"):
            verify_engines([engine.client], engine.expected)


@pytest.mark.parametrize(("model_type", "changes"), [("deepseek_v2", {"q_lora_rank": 24}), ("deepseek_v3", {})])
def test_latent_attention_is_served_and_proven(tmp_path: Path, model_type: str, changes: dict):
    """SGLang makes one parameter of two tensors, and of another two that it multiplies by and that no checksum covers.
    The first two travel in one bucket, however small the buckets are."""
    folder = write_tiny_known(tmp_path / "model", model_type, **changes)
    start = load_file(folder / "model.safetensors")

    def draw(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: tensor + (0.1 * torch.randn(tensor.shape, generator=generator) if seed else 0.0)
                for name, tensor in start.items()}

    with EngineProcess.from_config(ROLLOUT, folder, log_path=tmp_path / "engine.log") as process:
        engine = LiveEngine(process, folder, draw)
        engine.expected = ExpectedChecksums(asdict(read_config(folder)), engine_dtype=torch.float32)
        for bucket_bytes in (1, SMALL_BUCKET):
            old, new = engine.weights, engine.new_weights()
            engine.publish(new, TensorPublisher([engine.client], bucket_bytes=bucket_bytes))
            results = engine.generate(PROMPTS, SAMPLING)
            assert engine.largest_error(PROMPTS, results) < 1e-4
            assert engine.largest_error(PROMPTS, results, weights=old) > 1e-3


def other_weights(engine: LiveEngine) -> ExpectedChecksums:
    expected = ExpectedChecksums(engine.config, engine_dtype=torch.float32)
    for _ in expected.watch(engine.new_weights().items()):
        pass
    return expected


def test_an_update_that_a_killed_trainer_left_open_is_ended_first(live_engine: LiveEngine):
    live_engine.call(live_engine.client.pause_generation("retract"))
    live_engine.call(live_engine.client.begin_weight_update())
    live_engine.publish(live_engine.new_weights())  # by a publisher that knows nothing of it
    assert live_engine.largest_error(PROMPTS, live_engine.generate(PROMPTS, SAMPLING)) < 1e-4


def test_report_counts_what_travelled(live_engine: LiveEngine, publisher: Publisher):
    weights = live_engine.weights
    report = publisher.publish(weights.items(), live_engine.version + 1)
    live_engine.version += 1
    total = sum(tensor.nbytes for tensor in weights.values())
    assert (report.tensors, report.bytes) == (len(weights), total)
    assert report.buckets >= total / SMALL_BUCKET


def test_disk_publisher_keeps_one_whole_folder(live_engine: LiveEngine, tmp_path: Path):
    publisher = DiskPublisher([live_engine.client], bucket_bytes=SMALL_BUCKET, folder=tmp_path,
                              config_folder=live_engine.folder)
    for _ in range(2):
        live_engine.publish(live_engine.new_weights(), publisher)
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"version_{live_engine.version}"
    assert {"config.json", "configuration_bailing_moe.py", "tokenizer.json"} <= {file.name for file in folder.iterdir()}


def test_versions_must_grow(live_engine: LiveEngine):
    publisher = TensorPublisher([live_engine.client], bucket_bytes=SMALL_BUCKET)
    live_engine.publish(live_engine.weights, publisher)
    with pytest.raises(ValueError, match=f"weight version {live_engine.version} does not follow"):
        publisher.publish(live_engine.weights.items(), live_engine.version)


@pytest.mark.parametrize("name", [
    "lm_head.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.experts.3.gate_proj.weight",
    "model.layers.2.mlp.experts.7.down_proj.weight",
    "model.layers.2.mlp.shared_experts.up_proj.weight",
    "model.layers.1.attention.query_key_value.weight",
])
def test_one_changed_number_is_noticed(live_engine: LiveEngine, name: str):
    """The trainer's tensor differs from what the engine got in a single element."""
    live_engine.publish(live_engine.weights)
    tampered = dict(live_engine.weights)
    tampered[name] = tampered[name].clone()
    tampered[name].view(-1)[-1] += 1e-3
    list(live_engine.expected.watch(tampered.items()))
    prefix = name.rsplit(".mlp.", 1)[0]
    with pytest.raises(WeightMismatchError, match=f"1 parameters differ: {prefix}"):
        verify_engines([live_engine.client], live_engine.expected)


def test_a_publish_that_did_not_happen_is_noticed(live_engine: LiveEngine):
    live_engine.publish(live_engine.weights)
    list(live_engine.expected.watch(live_engine.new_weights().items()))
    with pytest.raises(WeightMismatchError, match=r"\d+ parameters differ: model.word_embeddings.weight"):
        verify_engines([live_engine.client], live_engine.expected)


def test_a_tensor_that_was_not_published_is_noticed(live_engine: LiveEngine):
    live_engine.publish(live_engine.weights)
    without = {name: tensor for name, tensor in live_engine.weights.items() if name != "model.norm.weight"}
    list(live_engine.expected.watch(without.items()))
    with pytest.raises(WeightMismatchError, match="are in the engine but were not published: model.norm.weight"):
        verify_engines([live_engine.client], live_engine.expected)


def test_a_missing_expert_is_named(live_engine: LiveEngine):
    missing = "model.layers.1.mlp.experts.2.up_proj.weight"
    expected = ExpectedChecksums(live_engine.config, engine_dtype=torch.float32)
    list(expected.watch((name, tensor) for name, tensor in live_engine.weights.items() if name != missing))
    with pytest.raises(ValueError, match="tensors that make up model.layers.1.mlp.experts.w13_weight"):
        expected.digests()


def test_failed_publish_names_the_bucket_and_leaves_the_engine_paused(live_engine: LiveEngine):
    broken = dict(live_engine.weights)
    broken["model.norm.weight"] = torch.zeros(7)
    publisher = BroadcastPublisher([live_engine.client], bucket_bytes=SMALL_BUCKET, backend="gloo", device="cpu")
    with pytest.raises(PublishError, match=r"version \d+: bucket \d+ \(.* HTTP 400: .* stay paused"):
        publisher.publish(broken.items(), live_engine.version + 1)

    async def try_to_generate():
        return await live_engine.client.generate((5, 6), rid="paused", sampling=SAMPLING, timeout_s=0.5)

    with pytest.raises(EngineHTTPError, match="no answer within 0.5 s"):
        live_engine.call(try_to_generate())
    publisher.close()
    live_engine.publish(live_engine.weights)  # ends the update that was left open
    assert live_engine.largest_error(PROMPTS, live_engine.generate(PROMPTS, SAMPLING)) < 1e-4


def test_a_publish_broken_off_anywhere_is_made_good_by_the_next(live_engine: LiveEngine, publisher: Publisher):
    """At ten random tensors; then checksums are equal, and log-probabilities are those of the new weights."""
    chance = np.random.default_rng(0)
    probe = list(range(10, 40))
    for _ in range(10):
        new = live_engine.new_weights()
        broken_at = int(chance.integers(1, len(new)))

        def until_it_breaks(new=new, broken_at=broken_at):
            yield from itertools.islice(new.items(), broken_at)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            publisher.publish(until_it_breaks(), live_engine.version + 1)
        live_engine.publish(new, publisher)
        found = live_engine.call(live_engine.client.input_logprobs(probe, rid="probe."))
        expected = response_logprobs(new, live_engine.config, probe[:1], probe[1:]).numpy()
        assert np.abs(found - expected).max() < 1e-4


class Breaking(EngineClient):
    """Breaks off at its call number `at`, before the engine has heard of it or after the engine has obeyed."""

    def __init__(self, url: str, at: int, *, obeyed: bool):
        super().__init__(url, timeout_s=300.0, api_key=os.environ[ENGINE_KEY])
        self._left, self._obeyed = at, obeyed

    async def _post(self, path: str, body: Any, *, timeout_s: float | None = None) -> Any:
        self._left -= 1
        if self._left or self._obeyed:
            answer = await super()._post(path, body, timeout_s=timeout_s)
        if not self._left:
            raise Killed(path)
        return answer


class Killed(Exception):
    pass


@pytest.mark.parametrize("obeyed", [False, True], ids=["before", "after"])
def test_a_publish_broken_off_at_any_call_is_made_good_by_the_next(live_engine: LiveEngine, obeyed: bool):
    """Pause, begin, every bucket, end, flush, continue; by a publisher that knows nothing of the one before."""
    probe, calls = list(range(10, 40)), []
    for at in itertools.count(1):
        new = live_engine.new_weights()
        client = Breaking(live_engine.process.base_url, at, obeyed=obeyed)
        breaking = TensorPublisher([client], bucket_bytes=SMALL_BUCKET)
        try:
            breaking.publish(new.items(), live_engine.version + 1)
            break
        except Killed as killed:
            calls.append(str(killed))
        live_engine.publish(new)
        found = live_engine.call(live_engine.client.input_logprobs(probe, rid="probe."))
        expected = response_logprobs(new, live_engine.config, probe[:1], probe[1:]).numpy()
        assert np.abs(found - expected).max() < 1e-4
    live_engine.weights, live_engine.version = new, live_engine.version + 1
    buckets = ["/update_weights_from_tensor"] * len(list(make_buckets(new.items(), SMALL_BUCKET)))
    assert calls == ["/pause_generation", "/begin_weight_update", *buckets, "/end_weight_update", "/flush_cache",
                     "/continue_generation"]


def test_an_engine_that_fails_is_named_and_the_others_get_the_weights(live_engine: LiveEngine, tmp_path: Path):
    nobody = EngineClient(f"http://127.0.0.1:{choose_port(None)}")
    clients = [nobody, live_engine.client]
    for publisher in (TensorPublisher(clients, bucket_bytes=SMALL_BUCKET),
                      DiskPublisher(clients, bucket_bytes=SMALL_BUCKET, folder=tmp_path / "weights",
                                    config_folder=live_engine.folder)):
        new = live_engine.new_weights()
        report = publisher.publish(live_engine.expected.watch(new.items()), live_engine.version + 1)
        live_engine.weights, live_engine.version = new, live_engine.version + 1
        assert list(report.failures) == [nobody.base_url]
        verify_engines([live_engine.client], live_engine.expected)
        assert live_engine.largest_error(PROMPTS, live_engine.generate(PROMPTS, SAMPLING)) < 1e-4


def test_engines_stay_paused_with_the_new_weights_until_they_are_told_to_go_on(live_engine: LiveEngine):
    """The orchestrator checks them meanwhile; here a tensor was tampered with on the way."""
    def tampered(tensors):
        for name, tensor in tensors:
            yield name, tensor + 1e-3 if name == "model.norm.weight" else tensor

    async def try_to_generate():
        return await live_engine.client.generate((5, 6), rid="paused.", sampling=SAMPLING, timeout_s=0.5)

    publisher = TensorPublisher([live_engine.client], bucket_bytes=SMALL_BUCKET)
    watched = live_engine.expected.watch(live_engine.weights.items())
    publisher.publish(tampered(watched), live_engine.version + 1, resume=False)
    with pytest.raises(WeightMismatchError, match="1 parameters differ: model.norm.weight"):
        verify_engines([live_engine.client], live_engine.expected)
    with pytest.raises(EngineHTTPError, match="no answer within 0.5 s"):
        live_engine.call(try_to_generate())
    live_engine.publish(live_engine.weights)


def test_buckets_keep_order_respect_the_limit_and_align_dtypes():
    tensors = [
        ("a", torch.zeros(3, dtype=torch.float32)),  # 12 bytes
        ("b", torch.zeros(5, dtype=torch.bfloat16)),  # 10 bytes: 22 in all, not a multiple of 4
        ("c", torch.zeros(1, dtype=torch.float32)),  # would start at byte 22: a new bucket
        ("d", torch.zeros(100, dtype=torch.float32)),  # larger than a bucket: alone
        ("e", torch.zeros(2, dtype=torch.float32)),
    ]
    buckets = list(make_buckets(iter(tensors), 32))
    assert [[name for name, _ in bucket.tensors] for bucket in buckets] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [bucket.num_bytes for bucket in buckets] == [22, 4, 400, 8]
    assert [bucket.last for bucket in buckets] == [False, False, False, True]


def test_tensors_that_the_engine_joins_share_a_bucket():
    names = [f"model.layers.{layer}.self_attn.{part}.weight" for layer in (0, 1) for part in (
        "kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj")]
    tensors = [(name, torch.zeros(4)) for name in names]
    found = [[name.split(".", 2)[2] for name, _ in bucket.tensors] for bucket in make_buckets(tensors, 16)]
    assert found == [[f"{layer}.self_attn.{part}.weight" for part in parts] for layer in (0, 1) for parts in (
        ["kv_b_proj"], ["kv_a_proj_with_mqa", "q_a_proj"], ["q_b_proj"])]
    alone = [pair for pair in tensors if "q_a_proj" not in pair[0]]  # queries that come from no latent vector
    assert sorted(name for bucket in make_buckets(alone, 16) for name, _ in bucket.tensors) == sorted(
        name for name, _ in alone)


def test_nothing_to_publish_is_an_error():
    with pytest.raises(ValueError, match="nothing to publish"):
        list(make_buckets([], 32))
