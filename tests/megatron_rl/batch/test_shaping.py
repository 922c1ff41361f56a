"""Each term of reward.shaping by hand, their sum in the rewards, their means in the metrics, and no verdict changed."""

from __future__ import annotations

import re
import zlib

import numpy as np
import pytest

from megatron_rl.batch import BudgetFill, assemble
from megatron_rl.batch.shaping import TERMS, shaped
from megatron_rl.config.load import load
from megatron_rl.config.reward import SHAPING_TERMS, ShapingConfig
from megatron_rl.config.schema import AlgoConfig
from megatron_rl.orchestrator.record import rollout_metrics
from megatron_rl.prompts import check_effort
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score, VersionSpan

RIGHT, WRONG, FAILED = Score(1.0, "correct"), Score(0.0, "wrong"), Score(0.0, "engine_error")


def group(*responses: tuple[int, Score], texts: tuple[str, ...] = (), **metadata) -> RolloutGroup:
    """Responses as (sampled tokens, verdict), after a prompt of two tokens."""
    rollouts = tuple(Rollout(np.zeros(2 + n, np.int32), np.arange(2 + n) >= 2, np.zeros(2 + n, np.float32), Finish.STOP,
                             (VersionSpan(0, 0, n),)) for n, _ in responses)
    return RolloutGroup(Prompt("id", (1, 2), "text", "7", "math", metadata), rollouts, texts or ("",) * len(responses),
                        tuple(score for _, score in responses))


def of(term: str, given: RolloutGroup, **options) -> list[float]:
    return shaped(given, (ShapingConfig(term, **options),))[term].tolist()


def test_length_is_within_the_group_and_a_wrong_answer_gains_nothing():
    # of 10 to 30 tokens: p = 0.5, 0.25, 0, -0.5; a wrong answer keeps the negative part only
    given = group((10, RIGHT), (15, WRONG), (20, RIGHT), (30, WRONG))
    assert of("length", given) == pytest.approx([0.5, 0.0, 0.0, -0.5], abs=1e-9)
    assert of("length", given, strength=0.4) == pytest.approx([0.2, 0.0, 0.0, -0.2], abs=1e-7)
    assert of("length", group((30, RIGHT), (10, RIGHT))) == pytest.approx([-0.5, 0.5])


def test_equal_lengths_are_all_the_shortest():
    assert of("length", group((8, RIGHT), (8, RIGHT), (8, WRONG))) == pytest.approx([0.5, 0.5, 0.0])


def test_a_failed_response_is_not_shaped_and_its_length_does_not_count():
    given = group((10, RIGHT), (20, RIGHT), (900, FAILED), (1, FAILED))
    assert of("length", given) == pytest.approx([0.5, -0.5, 0.0, 0.0])
    assert of("length", group((5, FAILED), (6, FAILED))) == [0.0, 0.0]


def test_a_harder_prompt_is_shaped_less():
    easy, hard = group((10, RIGHT), (20, RIGHT)), group((10, RIGHT), (20, WRONG), (15, WRONG), (7, FAILED))
    assert of("length", easy, by_pass_rate=True) == pytest.approx([0.5, -0.5])
    assert of("length", hard, by_pass_rate=True) == pytest.approx([0.5 / 3, -0.5 / 3, 0.0, 0.0], abs=1e-6)


def test_thinking_efforts_are_strengths_of_the_length_term():
    efforts = {"low": 1.0, "high": 0.0}
    for effort, strength in (("low", 1.0), ("high", 0.0), (None, 0.25)):
        given = group((10, RIGHT), (20, RIGHT), **({} if effort is None else {"effort": effort}))
        assert of("length", given, efforts=efforts, strength=0.25) == pytest.approx([strength / 2, -strength / 2])
    for effort in ("mid", 1, ["low"]):
        with pytest.raises(ValueError, match=rf"its effort is {re.escape(repr(effort))}, but .* length are low, high"):
            check_effort(group((1, RIGHT), effort=effort).prompt, (ShapingConfig("length", efforts=efforts),))


@pytest.mark.parametrize(("text", "penalty"), [
    ("<think>a</think> 7", 0.0), ("a</think> <think> again", -0.5), ("a</think>b</think><think>", -0.5), ("7", 0.0),
    ("<think> and no end", -0.5), ("", 0.0)])
def test_format_looks_at_the_answer_part_alone(text, penalty):
    assert of("format", group((3, RIGHT), texts=(text,))) == [penalty]


def test_repetition_falls_with_the_compression_ratio():
    texts = ("again and " * 300, "The sum of 17 and 25 is 42, since 7 and 5 make 12.", "")
    ratio = len(zlib.compress(texts[0].encode())) / len(texts[0])
    assert ratio < 0.02
    given = group((9, RIGHT), (9, RIGHT), (9, RIGHT), texts=texts)
    assert of("repetition", given) == pytest.approx([ratio / 0.2 - 1, 0.0, 0.0])
    assert of("repetition", given, ratio=ratio / 2) == [0.0, 0.0, 0.0]


def test_terms_add_up_in_the_rewards_are_logged_apart_and_change_no_verdict():
    config = load(["reward.shaping=[{term: length, strength: 0.4}, {term: format, strength: 2.0}]",
                   "algo.phi=1000", "algo.underfull=train_short", "algo.dynamic_sampling=true"])
    given = group((10, RIGHT), (20, RIGHT), (15, WRONG), (9, FAILED), texts=("</think>", "</think><think>", "", ""))
    fill = BudgetFill(config.algo, 1, 100, config.reward.shaping)
    assert fill.rewards(given).tolist() == pytest.approx([1.2, -0.2, 0.0, 0.0])
    metrics = rollout_metrics([given], fill, version=0)
    assert metrics["reward/shaping/length"] == pytest.approx(0.0, abs=1e-7)
    assert metrics["reward/shaping/format"] == pytest.approx(-1 / 3)
    assert metrics["reward/mean"] == pytest.approx(metrics["reward/unshaped_mean"] - 1 / 3)
    assert metrics["reward/pass_rate"] == pytest.approx(2 / 3)
    [batch] = assemble([given], config.algo, dp=1, seed=0, step=0, max_response_tokens=100,
                       shaping=config.reward.shaping)
    best = max(batch.samples, key=lambda sample: sample.advantage)
    assert (best.index, len(batch.samples)) == (0, 3)
    alike = group((10, RIGHT), (20, RIGHT))  # shaping makes their rewards differ; they teach nothing all the same
    assert fill.usable_tokens(alike.rollouts, alike.scores) == [0, 0]


def test_the_overlong_penalty_is_a_term_among_the_others():
    fill = BudgetFill(AlgoConfig(truncated="overlong_penalty", overlong_buffer_tokens=10), 1, 20,
                      (ShapingConfig("length"),))
    given = group((10, RIGHT), (15, RIGHT))
    assert {name: values.tolist() for name, values in fill.shaped(given).items()} == {
        "overlong": [0.0, -0.5], "length": pytest.approx([0.5, -0.5])}
    assert fill.rewards(given).tolist() == pytest.approx([1.5, 0.0])


def test_metrics_ask_your_function_once_so_that_the_mean_reward_is_the_sum_they_tell(monkeypatch, tmp_path):
    (tmp_path / "my_draws.py").write_text("import random\n\n\ndef draw(group):\n    return [random.random()]\n")
    monkeypatch.syspath_prepend(tmp_path)
    fill = BudgetFill(AlgoConfig(), 1, 20, (ShapingConfig("my_draws.draw"),))
    metrics = rollout_metrics([group((10, RIGHT))], fill, version=0)
    assert metrics["reward/mean"] == pytest.approx(1 + metrics["reward/shaping/draw"])


def test_your_number_of_a_failed_response_does_not_matter_and_must_be_finite_for_others(monkeypatch, tmp_path):
    (tmp_path / "my_numbers.py").write_text("def of(group):\n    return [float('nan'), 0.5]\n")
    monkeypatch.syspath_prepend(tmp_path)
    term = (ShapingConfig("my_numbers.of"),)
    assert shaped(group((1, FAILED), (2, RIGHT)), term)["of"].tolist() == [0.0, 0.5]
    with pytest.raises(ValueError, match="reward.shaping=my_numbers.of returned .*must be finite"):
        shaped(group((1, RIGHT), (2, RIGHT)), term)


@pytest.mark.parametrize(("shaping", "said"), [
    ("[{term: lenght}]", "reward.shaping=lenght must be package.module.function, or one of length, format, repetition"),
    ("[{}]", "reward.shaping= must be"), ("[{term: length, strength: .inf}]", "strength="),
    ("[{term: length}, {term: a.length}]", "length, length: two terms have the same name"),
    ("[{term: my.overlong}]", "reward.shaping=my.overlong: overlong is the term of algo.truncated=overlong_penalty"),
    ("[{term: length, ratio: 0.3}]", "length: ratio=0.3 is read with term=repetition alone: leave it out"),
    ("[{term: repetition, ratio: 0}]", r"ratio=0.0 must lie in \(0, 1\]"), ("[{name: length}]", "name")])
def test_a_wrong_term_is_named(shaping, said):
    with pytest.raises(ValueError, match=said):
        load([f"reward.shaping={shaping}"])


def test_the_terms_that_the_configuration_knows_are_those_that_exist():
    assert tuple(TERMS) == SHAPING_TERMS
