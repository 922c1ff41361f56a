"""Statistics of correctness follow the verdicts, whatever the scale or the shape of the rewards."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_rl.batch import BudgetFill, assemble
from megatron_rl.config.load import load
from megatron_rl.config.schema import AlgoConfig
from megatron_rl.observe.verdicts import correctness_metrics, is_mixed
from megatron_rl.orchestrator.evaluation import summary
from megatron_rl.orchestrator.record import rollout_metrics
from megatron_rl.recipes.select_checkpoint import measure
from megatron_rl.reward.user import score_of
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score, VersionSpan

VERDICTS = [(True, True, False, False), (False, False, False, False), (True, True, True, True),
            (True, False, False, False)]
LENGTHS = [(3, 9, 20, 18), (4, 8, 16, 20), (20, 4, 6, 8), (5, 5, 17, 20)]  # limit 20, fined from 12 on

# Each says what a response with a verdict is worth; the second argument is its number of tokens.
SCALES = {
    "0 and 1": lambda right, tokens: Score(float(right), "correct" if right else "wrong"),
    "-1 and +1": lambda right, tokens: Score(1.0 if right else -1.0, "correct" if right else "wrong"),
    "0 and 10": lambda right, tokens: Score(10.0 * right, "correct" if right else "wrong"),
    "all negative": lambda right, tokens: Score(-0.5 if right else -2.0, "correct" if right else "wrong"),
    "shaped by the user": lambda right, tokens: Score(right - tokens / 100, "correct" if right else "no_answer"),
    "one value for all": lambda right, tokens: Score(0.5, "correct" if right else "timeout"),
    "numbers alone, 0 and 1": lambda right, tokens: score_of(float(right), 1.0),
    "numbers alone, -1 and +1": lambda right, tokens: score_of(1.0 if right else -1.0, 1.0),
    "numbers alone, full marks 10": lambda right, tokens: score_of(10.0 if right else 0.0, 10.0),
}


def rollout(tokens: int, given: int = 0) -> Rollout:
    """A prompt of 3 tokens, two sampled ones, `given` of an environment, then the rest of `tokens` sampled ones."""
    length = 3 + tokens + given
    trainable = np.arange(length) >= 3
    trainable[5:5 + given] = False
    return Rollout(np.arange(length, dtype=np.int32), trainable, np.zeros(length, np.float32), Finish.STOP,
                   (VersionSpan(0, 0, tokens),))


def groups_of(score, verdicts=VERDICTS, lengths=LENGTHS) -> list[RolloutGroup]:
    return [RolloutGroup(Prompt("p", (1, 2, 3), "q", "7", "math"), tuple(map(rollout, tokens)),
                         tuple(rf"so \boxed{{{7 if right else 8}}}" for right in rights),
                         tuple(score(right, n) for right, n in zip(rights, tokens, strict=True)))
            for rights, tokens in zip(verdicts, lengths, strict=True)]


@pytest.mark.parametrize("shaped", ["train", "overlong_penalty"])
@pytest.mark.parametrize("score", SCALES.values(), ids=SCALES)
def test_step_statistics_are_those_of_the_verdicts(score, shaped):
    """7 of 16 are right; groups 1, 3 and 4 of 4 have a right one, group 3 only right ones, groups 1 and 4 are mixed."""
    fill = BudgetFill(AlgoConfig(truncated=shaped, overlong_buffer_tokens=8), 1, 20)
    metrics = rollout_metrics(groups_of(score), fill, version=0)
    assert metrics["reward/pass_rate"] == 7 / 16
    assert metrics["groups/any_correct_fraction"] == 3 / 4
    assert metrics["groups/all_correct_fraction"] == 1 / 4
    assert metrics["groups/mixed_fraction"] == 2 / 4


@pytest.mark.parametrize("score", SCALES.values(), ids=SCALES)
def test_evaluation_is_of_the_verdicts(score):
    groups = groups_of(score)
    values = summary(groups, resamples=20, seed=0)
    assert values["accuracy"] == 7 / 16
    assert values["pass@2"] == pytest.approx(((1 - 1 / 6) + 0 + 1 + (1 - 3 / 6)) / 4)
    assert values["pass@4"] == 3 / 4
    assert values["maj@4"] == (0.5 + 0 + 1 + 0) / 4
    assert values["mean_reward"] == pytest.approx(np.mean([s.value for group in groups for s in group.scores]))


@pytest.mark.parametrize("score", SCALES.values(), ids=SCALES)
def test_checkpoints_are_measured_by_verdicts(score, tmp_path):
    found = measure(load(["experiment=quickstart"]), groups_of(score), tmp_path / "epoch_01")
    assert (found.pass_at_1, found.pass_at_k) == (7 / 16, 3 / 4)


@pytest.mark.parametrize("score", SCALES.values(), ids=SCALES)
def test_dapo_drops_groups_that_are_all_right_or_all_wrong_however_long(score):
    """Under algo=dapo the fine for length makes the rewards of every group differ; groups 1 and 4 are drawn from."""
    algo = load(["algo=dapo", "algo.overlong_buffer_tokens=8"]).algo
    [batch] = assemble(groups_of(score), algo, dp=1, seed=0, step=0, max_response_tokens=20)
    assert batch.num_responses == 8
    assert {sample.index // 4 for sample in batch.samples} == {0, 3}


def graded(values, correct_from=None) -> list[RolloutGroup]:
    numbers = iter(values)
    return groups_of(lambda right, tokens: score_of(next(numbers), correct_from), VERDICTS[:2], LENGTHS[:2])


def test_of_a_reward_without_full_marks_nothing_is_said_of_correctness():
    groups = graded([3.5, -2.0, 0.25, 0.25, 1.0, 1.0, 1.0, 1.0])
    assert correctness_metrics(groups) == {"groups/mixed_fraction": 0.5}
    values = summary(groups, resamples=5, seed=0)
    assert not [name for name in values if name.startswith(("accuracy", "low", "high", "pass@", "maj@"))]
    assert values["mean_reward"] == 6 / 8
    with pytest.raises(ValueError, match=r"set reward\.correct_from"):
        measure(load(["experiment=quickstart"]), groups, None)


def test_a_graded_reward_with_full_marks_is_right_at_full_marks_only():
    groups = graded([1.0, 0.75, 0.25, 0.0, 0.5, 0.5, 0.5, 0.5], 1.0)
    assert correctness_metrics(groups) == {"reward/pass_rate": 1 / 8, "groups/any_correct_fraction": 1 / 2,
                                           "groups/all_correct_fraction": 0.0, "groups/mixed_fraction": 1 / 2}


def test_graded_groups_are_mixed_if_their_unshaped_rewards_differ():
    """Four equal grades of uneven length teach nothing but length; unequal grades teach, even if none is full marks."""
    fill = BudgetFill(AlgoConfig(dynamic_sampling=True, truncated="overlong_penalty", overlong_buffer_tokens=8), 1, 20)
    for correct_from in (None, 1.0):
        unequal, equal = graded([0.5, 0.25, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5], correct_from)
        offered = [fill.usable_tokens(group.rollouts, group.scores)
                   for group in (unequal, equal)]
        assert offered == [list(LENGTHS[0]), [0, 0, 0, 0]]


def test_groups_with_and_without_correctness_stand_side_by_side():
    groups = groups_of(SCALES["0 and 1"]) + graded([0.5] * 8)
    assert correctness_metrics(groups) == {"reward/pass_rate": 7 / 16, "groups/any_correct_fraction": 3 / 4,
                                           "groups/all_correct_fraction": 1 / 4, "groups/mixed_fraction": 2 / 6}


@pytest.mark.parametrize(("number", "correct_from", "expected"), [
    (1.0, 1.0, Score(1.0, "correct")), (3.0, 1.0, Score(3.0, "correct")), (0.0, 1.0, Score(0.0, "wrong")),
    (-1.0, 1.0, Score(-1.0, "wrong")), (0.99, 1.0, Score(0.99, "graded", correct=False)),
    (0.5, 0.5, Score(0.5, "correct")), (9.0, 10.0, Score(9.0, "graded", correct=False)),
    (1.0, None, Score(1.0, "graded")), (-4.0, None, Score(-4.0, "graded"))])
def test_a_number_alone_is_judged_by_the_key(number, correct_from, expected):
    assert score_of(number, correct_from) == expected


def test_correctness_follows_from_the_status_and_cannot_contradict_it():
    assert [Score(0.0, status).correct for status in ("correct", "wrong", "timeout", "error", "graded")] == [
        True, False, False, False, None]
    for status, correct in (("correct", False), ("wrong", True), ("graded", True)):
        with pytest.raises(ValueError, match="only then"):
            Score(1.0, status, correct=correct)


def test_rewards_are_reported_shaped_and_unshaped():
    """Lengths 3 and 20 of a limit of 20, buffer 8: fines 0 and -1 on rewards of 1."""
    groups = groups_of(SCALES["0 and 1"], [(True, True)], [(3, 20)])
    fill = BudgetFill(AlgoConfig(truncated="overlong_penalty", overlong_buffer_tokens=8), 1, 20)
    metrics = rollout_metrics(groups, fill, version=0)
    assert (metrics["reward/mean"], metrics["reward/unshaped_mean"]) == (0.5, 1.0)


def test_the_penalty_counts_the_tokens_that_the_limit_counts():
    """4 sampled tokens and 14 given by a tool are 18 of 20 after the prompt: 6 of the buffer's 8 are used."""
    with_tool = rollout(4, given=14)
    assert (with_tool.response_tokens, with_tool.tokens_after_prompt) == (4, 18)
    fill = BudgetFill(AlgoConfig(truncated="overlong_penalty", overlong_buffer_tokens=8), 1, 20)
    assert fill.penalties([with_tool, rollout(18), rollout(4)]).tolist() == [-0.75, -0.75, 0.0]


def test_a_group_is_mixed_by_its_verdicts():
    assert is_mixed([Score(1, "correct"), Score(1, "no_answer")])
    assert not is_mixed([Score(0, "wrong"), Score(-1, "timeout")])


def test_failed_responses_take_no_part():
    """Two of three judged responses are right; a group that failed whole is in no statistic of correctness."""
    right, wrong, lost = Score(1.0, "correct"), Score(0.0, "wrong"), Score(0.0, "engine_error")
    prompt, answer = Prompt("p", (1, 2, 3), "", "", "math"), rollout(4)
    groups = [RolloutGroup(prompt, (answer,) * 3, ("",) * 3, scores)
              for scores in [(right, wrong, lost), (lost, lost, lost), (right, lost, lost)]]
    assert correctness_metrics(groups) == {
        "groups/mixed_fraction": 1 / 3, "reward/pass_rate": 2 / 3, "groups/any_correct_fraction": 1.0,
        "groups/all_correct_fraction": 1 / 2}


@pytest.mark.parametrize("failure", ["error", "engine_error", "environment_error"])
@pytest.mark.parametrize("score", SCALES.values(), ids=SCALES)
def test_failed_responses_change_no_statistic_of_the_others(score, failure, tmp_path):
    """One more response of each group fails, and one whole group: what is said of the others stays as it was."""
    whole = groups_of(score)
    failed = Score(0.0, failure)
    broken = [RolloutGroup(group.prompt, (*group.rollouts, rollout(19)), (*group.texts, r"\boxed{8}"),
                           (*group.scores, failed)) for group in whole]
    broken.append(RolloutGroup(whole[0].prompt, (rollout(7),) * 5, ("",) * 5, (failed,) * 5))
    fill = BudgetFill(AlgoConfig(), 1, 20)
    before, after = rollout_metrics(whole, fill, version=0), rollout_metrics(broken, fill, version=0)
    own = ("rollout/failed_fraction", "groups/mixed_fraction")  # of all responses, and of all groups
    same = [name for name in before if name not in own and not name.startswith("reward/status/")]
    assert len(same) > 10 and {name: after[name] for name in same} == {name: before[name] for name in same}
    assert (after["rollout/failed_fraction"], after["groups/mixed_fraction"]) == (9 / 25, 2 / 5)
    before, after = (summary(groups, resamples=20, seed=0) for groups in (whole, broken))
    same = ("accuracy", "pass@2", "pass@4", "maj@4", "mean_reward", "mean_response_tokens", "truncated_fraction")
    assert {name: after[name] for name in same} == {name: pytest.approx(before[name]) for name in same}
    assert after["failed_fraction"] == 9 / 25 and "pass@5" not in after
    before, after = (measure(load(["experiment=quickstart"]), groups, tmp_path / "epoch_01")
                     for groups in (whole, broken))
    assert (after.pass_at_1, after.pass_at_k) == (before.pass_at_1, before.pass_at_k) == (7 / 16, 3 / 4)
