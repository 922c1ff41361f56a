"""What a rehearsal takes from a run's records and from stated distributions."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from megatron_rl.config.load import build
from megatron_rl.rehearsal.records import lengths_of, loads_of
from megatron_rl.rehearsal.standins import rows_with_busiest
from megatron_rl.rehearsal.step import Workload, rehearse
from megatron_rl.rehearsal.workload import scheduled_microbatches
from tests.megatron_rl.rehearsal.tiny import NETWORK, WORKLOAD, rehearsed, tiny_config

ROLLOUT = tiny_config().rollout  # at most 48 response tokens, prompts of up to 16


def run_with(folder, **metrics) -> str:
    rows = [{"step": step, **metrics} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_a_distribution_has_its_quantiles_and_the_seed_changes_the_order_alone():
    uniform = lengths_of("uniform", ROLLOUT)
    assert sorted(uniform.draw(4, 48)) == [6, 18, 30, 42]  # 48 x 1/8, 3/8, 5/8, 7/8
    lognormal = lengths_of("lognormal:20:0.5", ROLLOUT)
    assert lognormal.draw(4001, 10**9).mean() == pytest.approx(20, rel=0.02)
    median = 20 * np.exp(-0.5**2 / 2)
    assert np.median(lognormal.draw(4001, 10**9)) == pytest.approx(median, abs=0.5)
    assert lognormal.draw(4001, 48).max() == 48
    first, second = (uniform.draw(50, 48, seed) for seed in (0, 1))
    assert sorted(first) == sorted(second) and list(first) != list(second)


def test_a_runs_lengths_have_its_percentiles(tmp_path):
    recorded = {"p10": 4, "p50": 16, "p90": 32, "max": 40}
    folder = run_with(tmp_path, **{f"rollout/response_tokens_{name}": value for name, value in recorded.items()})
    drawn = lengths_of(folder, ROLLOUT).draw(10_001, 48)
    assert [np.percentile(drawn, share) for share in (10, 50, 90, 100)] == pytest.approx([4, 16, 32, 40], abs=0.5)


def test_a_runs_lengths_may_be_stretched_and_are_known_step_by_step(tmp_path):
    rows = [{f"rollout/response_tokens_{name}": length * value for name, value in
             {"p10": 1, "p50": 4, "p90": 8, "max": 10}.items()} for length in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = lengths_of(f"{tmp_path}:3", ROLLOUT)
    assert [np.percentile(step.draw(1001, 100), 50) for step in lengths.steps] == pytest.approx([12, 24], abs=0.5)
    assert [step.draw(1001, 100).max() for step in lengths.steps] == [30, 60]
    assert np.percentile(lengths.draw(1001, 100), 50) == pytest.approx(18, abs=0.5), "both steps together"
    assert "3 times as long" in lengths.name


@pytest.mark.parametrize(("text", "message"), [
    ("lognormal:20", "write lognormal:MEAN:SIGMA"), ("lognormal:20:-1", "two positive numbers"),
    ("no/run", "there is no no/run/metrics.jsonl"), ("no/run:0", "FACTOR must be above 0, such as no/run:64"),
    ("no/run:0.0", "FACTOR must be above 0")])
def test_other_lengths_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        lengths_of(text, ROLLOUT)


def test_a_run_without_the_records_is_refused_by_their_name(tmp_path):
    folder = run_with(tmp_path, loss=1.0)
    with pytest.raises(ValueError, match="have no rollout/response_tokens_p10"):
        lengths_of(folder, ROLLOUT)
    with pytest.raises(ValueError, match=r"loads of 0 layers \(none\).*1 layers with experts \(2 to 2\)"):
        loads_of(folder, NETWORK)


def test_the_busiest_expert_of_each_layer_gets_the_runs_load(tmp_path):
    """2 layers, the second with experts: 192 rows over 8 experts are 24 each; the busiest has 3 times as many."""
    loads = loads_of(run_with(tmp_path, **{"router/load_max_over_mean/layer_2": 3.0}), NETWORK)
    assert loads == {2: 3.0}
    assert rows_with_busiest(192, 8, range(4, 8), 3.0) == [18, 17, 17, 17, 72, 17, 17, 17]
    config = tiny_config(world_size=4, ep=2)
    even, uneven = rehearsed(config, 1), rehearsed(config, 1, imbalance=loads)
    row = 6 * NETWORK.hidden_size * NETWORK.moe_intermediate_size  # three matrices, 2 FLOPs each
    old = "old log-probabilities"  # this rank's experts get 123 rows of each of the two ranks, not 96
    assert uneven["phases"][old]["flops"] - even["phases"][old]["flops"] == 2 * (123 - 96) * row


def test_the_layer_behind_the_last_has_the_load_of_the_last():
    """Four experts of rank 0 get 72 + 18 + 17 + 17 rows of each of two ranks, not 96; in both layers, three passes."""
    network = dataclasses.replace(NETWORK, model_type="bailing_moe_v2", num_nextn_predict_layers=1)
    config = tiny_config(world_size=2, ep=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, mtp=True))
    flops = [sum(each.flops * count for each, count in rehearse(
        config, network, 0, WORKLOAD, imbalance={2: busiest}).recorder.operations.items() if each.phase == "update")
        for busiest in (1.0, 3.0)]
    row = 6 * NETWORK.hidden_size * NETWORK.moe_intermediate_size
    assert flops[1] - flops[0] == 3 * 2 * 2 * (124 - 96) * row


def test_the_runs_own_schedule_packs_the_lengths():
    """Phi is 96 for each of 2 ranks, and responses have 24 tokens on average: 8 of them, behind prompts of 8 tokens.

    That is 128 positions a rank, in micro-batches of at most 96: two of them.
    """
    config = build({"parallel": {"world_size": 2}, "algo": {"phi": 96, "scope": "per_dp_rank", "balance_coef": 0.01},
                    "model": {"dtype": "bfloat16"}, "batch": {"tokens_per_microbatch": 96},
                    "rollout": {"max_context_tokens": 64, "max_response_tokens": 48}})
    found = scheduled_microbatches(config, NETWORK, 0, lengths_of("uniform", ROLLOUT))
    assert isinstance(found, Workload) and sum(found.lengths) <= 96
    assert 1 < found.per_step <= 2 and found.microbatches == 1
