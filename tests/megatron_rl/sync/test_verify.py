"""Which engines prove what they hold, and that one of another kind takes nothing from the others.

That one on a CPU proves each publish without being asked for is seen in real runs (tests/engine/test_runs.py).
"""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_rl.config.load import load
from megatron_rl.orchestrator.weights import PublishedWeights
from megatron_rl.sync.publish import PublishError
from megatron_rl.sync.verify import EngineLayout, UnpredictableChecksumsError, layout_of, predictable

SENT = {"model.norm.weight": "00", "lm_head.weight": "01"}
GPU, CPU, SPREAD = ({"device": "cuda", "tp_size": 2, "ep_size": 1}, {"device": "cpu", "tp_size": 1},
                    {"device": "cuda", "tp_size": 2, "ep_size": 2})


class Engine:
    """The answers of an engine that cannot run here. held: its checksums, which every rank reports."""

    def __init__(self, url: str, info: dict):
        self.base_url, self.info, self.held = url, info, dict(SENT)

    async def server_info(self) -> dict:
        return self.info

    async def checksums(self) -> list[dict[str, str]]:
        return [dict(self.held) for _ in range(self.info["tp_size"])]

    async def input_logprobs(self, tokens, rid) -> np.ndarray:
        return np.zeros(len(tokens) - 1)

    async def continue_generation(self) -> None:
        pass


class Trainer:
    """Answers a publish as the trainer does; `asked` has the layouts of each. knows: whether it predicts them."""

    def __init__(self):
        self.asked: list[list[tuple[str, int]]] = []
        self.knows = True

    async def execute(self, kind: str, *, version: int, urls: list[str], layouts: list[tuple[str, int]]) -> dict:
        self.asked.append(layouts)
        return {"failures": {}, "bytes": 16, "reference": [0.0, 0.0], "free_bytes": {},
                "digests": {str(EngineLayout(*each)): [SENT] * each[1] for each in layouts if self.knows}}


def weights(trainer: Trainer, engines: list[Engine], *overrides: str) -> PublishedWeights:
    by_url = {engine.base_url: engine for engine in engines}
    fleet = SimpleNamespace(answering=lambda: list(by_url), client=by_url.get,
                            updating=lambda *_: None, published=lambda *_: None)
    made = PublishedWeights(load(["run.dir=unused", "model.path=unused", *overrides]), trainer, fleet)
    made.probe_tokens = [1, 2, 3]
    return made


def test_one_engine_that_cannot_be_predicted_takes_no_proof_from_the_others_and_is_said_once(caplog, messages):
    trainer = Trainer()
    mixed = weights(trainer, [Engine("http://cpu", CPU), Engine("http://spread", SPREAD), Engine("http://gpu", GPU)])
    with caplog.at_level(logging.WARNING):
        for version in (1, 2):
            asyncio.run(mixed.publish(version))
            assert mixed.metrics["sync/engines_verified"] == 2
    assert trainer.asked == [[("cpu", 1), ("cuda", 2)]] * 2
    (said,) = messages()
    assert "http://spread runs on cuda, ep_size=2" in said


def test_a_network_that_the_trainer_cannot_share_out_is_said_once(caplog, messages):
    trainer = Trainer()
    trainer.knows = False
    latent = weights(trainer, [Engine("http://gpu", GPU)])
    with caplog.at_level(logging.WARNING):
        for version in (1, 2):
            asyncio.run(latent.publish(version))
            assert latent.metrics["sync/engines_verified"] == 0
    assert trainer.asked == [[("cuda", 2)], []]
    (said,) = messages()
    assert "http://gpu shares this network among 2 ranks" in said


@pytest.mark.parametrize(("sizes", "tp", "known"), [
    ({}, 1, True), ({}, 2, True), ({}, 4, True), ({}, 3, False), ({"num_key_value_heads": 3}, 4, False),
    ({"intermediate_size": 126}, 4, False), ({"shared_expert_intermediate_size": 126}, 4, False),
    ({"kv_lora_rank": 32}, 2, False), ({"kv_lora_rank": 32}, 1, True)])
def test_only_even_shares_of_plain_attention_are_predicted(sizes, tp, known):
    network = {"num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 128,
               "moe_intermediate_size": 0, "kv_lora_rank": 0} | sizes
    assert predictable(network, EngineLayout("cuda", tp)) == known


def test_a_cpu_engine_must_hold_every_parameter():
    engine = Engine("http://cpu", CPU)
    engine.held["lm_head.weight"] = "ff"
    with pytest.raises(PublishError, match="does not serve the published weights; 1 parameters differ: lm_head"):
        asyncio.run(weights(Trainer(), [engine]).publish(1))


def test_a_gpu_engine_may_keep_a_parameter_in_its_own_form_from_the_first_publish_on_and_no_other_later(
        caplog, messages):
    engine = Engine("http://gpu", GPU)
    engine.held["lm_head.weight"] = "of its own"
    gpu = weights(Trainer(), [engine])
    with caplog.at_level(logging.WARNING):
        for version in (1, 2):
            asyncio.run(gpu.publish(version))
    (said,) = messages()
    assert "1 parameters in another form than predicted (lm_head.weight" in said
    engine.held["model.norm.weight"] = "ff"
    with pytest.raises(PublishError, match="tensor-parallel rank 0.*model.norm.weight"):
        asyncio.run(gpu.publish(3))


def test_an_engine_that_holds_nothing_as_predicted_is_not_counted_as_proven():
    engine = Engine("http://gpu", GPU)
    engine.held = dict.fromkeys(SENT, "of its own")
    gpu = weights(Trainer(), [engine])
    asyncio.run(gpu.publish(1))
    assert gpu.metrics["sync/engines_verified"] == 0


def test_who_asks_for_proof_gets_it_or_an_error():
    with pytest.raises(UnpredictableChecksumsError, match="runs on cuda.*rollout.verify_checksums=null"):
        asyncio.run(weights(Trainer(), [Engine("http://spread", SPREAD)], "rollout.verify_checksums=true").publish(1))
    engine = Engine("http://gpu", GPU)
    engine.held["lm_head.weight"] = "of its own"
    with pytest.raises(PublishError, match="lm_head.weight"):
        asyncio.run(weights(Trainer(), [engine], "rollout.verify_checksums=true").publish(1))


@pytest.mark.parametrize("other", [{"device": "xpu"}, {"pp_size": 2}, {"dp_size": 2}, {"quantization": "fp8"}])
def test_other_kinds_are_named(other):
    with pytest.raises(UnpredictableChecksumsError, match=f"engine http://x .*{[*other.values()][0]}"):
        layout_of(GPU | other, "http://x")
