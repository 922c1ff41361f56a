"""Statistics of correctness: over what the scorers call right (Score.correct), never over rewards.

A reward may be -1 or 1, a grade, or shaped by length; whether a response is right does not change with it.
These statistics leave out a group if nobody can say whether one of its responses is right (correct=None), and
every failed response, which has no verdict.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.types import RolloutGroup, Score

__all__ = ["correctness_metrics", "is_mixed", "judged", "known", "number_right", "right_shares"]


def known(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """The groups that have a verdict for every response, each right or wrong."""
    return [group for group in groups if judged(group) and all(score.correct is not None for score in group.scores)]


def judged(group: RolloutGroup) -> list[Score]:
    """The verdicts of a group: those of its responses that did not fail."""
    return [score for score in group.scores if not score.failed]


def number_right(group: RolloutGroup) -> int:
    return sum(score.correct is True for score in group.scores)


def right_shares(groups: Sequence[RolloutGroup]) -> list[list[float]]:
    """1 or 0 for each verdict of each group, as bootstrap_interval takes them."""
    return [[float(score.correct is True) for score in judged(group)] for group in groups]


def is_mixed(scores: Sequence[Score]) -> bool:
    """Whether a group has something to teach: right responses beside others.

    If a response is graded, correctness is not the whole verdict: then the group is mixed if its unshaped rewards
    differ. Penalties that training adds (the over-long penalty) play no part.
    """
    verdicts = [score for score in scores if not score.failed]
    if any(score.status == "graded" for score in verdicts):
        return len({score.value for score in verdicts}) > 1
    return len({score.correct for score in verdicts}) > 1


def correctness_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """reward/pass_rate and groups/* of a step (docs/metrics.md)."""
    whole = known(groups)
    metrics = {"groups/mixed_fraction": sum(is_mixed(group.scores) for group in groups) / len(groups)}
    if whole:
        right, sizes = [number_right(group) for group in whole], [len(judged(group)) for group in whole]
        metrics |= {
            "reward/pass_rate": sum(right) / sum(sizes),
            "groups/any_correct_fraction": sum(count > 0 for count in right) / len(whole),
            "groups/all_correct_fraction": sum(
                count == size for count, size in zip(right, sizes, strict=True)) / len(whole)}
    return metrics
