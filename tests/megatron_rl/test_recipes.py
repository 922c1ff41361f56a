"""How the parts' numbers become a step's metrics."""

import numpy as np
import pytest
import torch

from c3po import BudgetSelection, SumCount
from megatron_rl.batch import BudgetFill, StepBatch
from megatron_rl.config.schema import AlgoConfig
from megatron_rl.orchestrator.record import budget_metrics, rollout_metrics, update_metrics
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score, StepResult, VersionSpan


def group(*judged: tuple[str, float, int]) -> RolloutGroup:
    """Responses given as (text, score, tokens); a score below 0 is a truncated response."""
    rollouts = tuple(
        Rollout(token_ids=np.zeros(3 + n, np.int32), trainable=np.arange(3 + n) >= 3,
                rollout_logprobs=np.zeros(3 + n, np.float32),
                finish=Finish.LENGTH if value < 0 else Finish.STOP, weight_versions=(VersionSpan(0, 0, n),))
        for _, value, n in judged)
    scores = tuple(Score(max(value, 0.0), "correct" if value > 0 else "wrong") for _, value, _ in judged)
    texts = tuple(text for text, _, _ in judged)
    return RolloutGroup(Prompt("a", (1, 2, 3), "q", "7", "math"), rollouts, texts, scores)


GROUPS = [group((r"\boxed{7}", 1.0, 2), (r" so 7\boxed{7}", 1.0, 6), (" so", -1.0, 10)),
          group((r" so\boxed{1}", 0.0, 4), (r"\boxed{2}", 0.0, 2), (r"\boxed{7}", 0.0, 2))]


def test_rollout_metrics_by_hand():
    metrics = rollout_metrics(GROUPS, BudgetFill(AlgoConfig(), 1, 80), version=2)
    assert metrics["reward/mean"] == metrics["reward/unshaped_mean"] == pytest.approx(2 / 6)
    assert metrics["reward/pass_rate"] == pytest.approx(2 / 6)
    assert metrics["groups/any_correct_fraction"] == metrics["groups/mixed_fraction"] == 0.5
    # of 2, 2, 2, 4, 6, 10 tokens: the middle lies between 2 and 4, nine tenths halfway from 6 to 10
    assert {name.rpartition("_")[2]: value for name, value in metrics.items() if "response_tokens" in name} == {
        "mean": pytest.approx(26 / 6), "p10": 2.0, "p50": 3.0, "p90": 8.0, "max": 10.0}
    assert metrics["rollout/staleness_mean"] == metrics["rollout/staleness_max"] == 2  # sampled by version 0
    assert metrics["rollout/truncated_fraction"] == pytest.approx(1 / 6)
    assert metrics["reward/status/correct"] == pytest.approx(2 / 6)


def test_fill_is_selected_over_phi_over_all_updates():
    batches = [StepBatch((), BudgetSelection(torch.tensor([4, 6]), 10, 10), 2, 15),
               StepBatch((), BudgetSelection(torch.tensor([5]), 5, 10), 1, 5)]
    metrics = budget_metrics(GROUPS, batches)  # of 26 response tokens
    assert metrics == {"budget/phi": 20, "budget/selected_tokens": 15, "budget/fill": 0.75, "budget/dropped_tokens": 11}


def test_updates_combine_by_tokens_and_not_by_step():
    first = StepResult({"train/kl": SumCount(2.0, 1.0)}, {"train/selected_tokens": 1.0, "mismatch/max_abs": 0.5,
                                                          "train/grad_norm": 1.0})
    second = StepResult({"train/kl": SumCount(1.0, 2.0)}, {"train/selected_tokens": 2.0, "mismatch/max_abs": 0.1,
                                                           "train/grad_norm": 3.0})
    assert update_metrics([first, second]) == {"train/kl": 1.0, "train/selected_tokens": 3.0, "mismatch/max_abs": 0.5,
                                               "train/grad_norm": 2.0}


def test_skipped_steps_are_counted_over_the_updates_of_a_rollout():
    results = [StepResult({}, {"train/skipped_steps": skipped}, skipped=bool(skipped)) for skipped in (1.0, 0.0, 1.0)]
    assert update_metrics(results) == {"train/skipped_steps": 2.0}
