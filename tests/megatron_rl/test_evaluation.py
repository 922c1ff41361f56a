"""What judged responses amount to, by hand; and which sets are evaluated."""

import asyncio
import io
import sys
import textwrap

import numpy as np
import pytest
from rich.console import Console

from megatron_rl.config.load import load
from megatron_rl.orchestrator.evaluation import Measured, evaluation_data, summary
from megatron_rl.orchestrator.own_evaluations import check_evaluations, own_evaluations
from megatron_rl.recipes.evaluate import table
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score, VersionSpan


def group(texts, values):
    rollouts = tuple(Rollout(np.zeros(3 + len(text), np.int32), np.arange(3 + len(text)) >= 3,
                             np.zeros(3 + len(text), np.float32), Finish.LENGTH if "..." in text else Finish.STOP,
                             (VersionSpan(0, 0, len(text)),)) for text in texts)
    scores = tuple(Score(value, "correct" if value else "wrong") for value in values)
    return RolloutGroup(Prompt("p", (1, 2, 3), "q", "1/2", "math"), rollouts, tuple(texts), scores)


GROUPS = [  # 2 of 4 right, in two spellings, against two equal wrong ones: a tie; then 1 of 4 right
    group(["so \\boxed{1/2}", "so \\boxed{0.5}", "so \\boxed{3}", "so \\boxed{3}"], [1, 1, 0, 0]),
    group(["so \\boxed{1/2}", "so \\boxed{3}", "so \\boxed{3}", "so ..."], [1, 0, 0, 0]),
]


def test_summary_by_hand():
    values = summary(GROUPS, resamples=50, seed=0)
    assert values["accuracy"] == 3 / 8 and values["low"] <= 3 / 8 <= values["high"]
    assert (values["problems"], values["samples_per_problem"]) == (2, 4)
    assert values["pass@2"] == pytest.approx(((1 - 1 / 6) + (1 - 3 / 6)) / 2)  # C(2,2)/C(4,2), C(3,2)/C(4,2)
    assert values["pass@4"] == 1.0 and values["maj@4"] == (0.5 + 0.0) / 2
    assert values["truncated_fraction"] == 1 / 8 and "maj@2" not in values


def test_without_boxes_there_is_no_vote():
    values = summary([group(["7", "8", "7", "7"], [1, 0, 1, 1])], resamples=5, seed=0)
    assert "maj@4" not in values and values["pass@4"] == 1.0


def test_the_table_has_a_line_for_each_number_and_fits_80_columns():
    """16 samples give four pass@k and three maj@k; a graded set has its mean reward instead."""
    values = summary([group(["\\boxed{1/2}"] * 16, [1] * 15 + [0])], resamples=5, seed=0)
    graded = {key: value for key, value in values.items() if "@" not in key and key not in ("accuracy", "low", "high")}
    shown = table([Measured("a benchmark with a long name", [], values), Measured("graded", [], graded)], "t")
    assert list(shown.columns[1].cells) == ["accuracy", "pass@2", "pass@4", "pass@8", "pass@16", "maj@4", "maj@8",
                                            "maj@16", "response tokens", "truncated", "mean reward",
                                            "response tokens", "truncated"]
    file = io.StringIO()
    Console(file=file, width=80).print(shown)
    assert "0.938 - 0.938" in file.getvalue() and "1 x 16" in file.getvalue()
    assert max(map(len, file.getvalue().splitlines())) <= 80 and "\u2026" not in file.getvalue()


def test_sets_are_the_held_out_one_and_the_benchmarks():
    more = ["eval.benchmarks.aime24.data.source=aime", "eval.benchmarks.aime24.data.path=a"]
    assert list(evaluation_data(load(["experiment=quickstart"]))) == ["held-out"]
    assert list(evaluation_data(load(["experiment=quickstart", *more]))) == ["held-out", "aime24"]
    assert list(evaluation_data(load(["experiment=quickstart", *more, "eval.problems=0"]))) == ["aime24"]
    assert evaluation_data(load(["experiment=quickstart", "eval.problems=0"])) == {}
    with pytest.raises(ValueError, match="eval.problems=-1 must not be negative"):
        load(["experiment=quickstart", "eval.problems=-1"])


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_evaluations_of_test.py").write_text(textwrap.dedent("""
        import asyncio
        async def right(ask, step): return {"right": step + len(await ask("1+1=", 2))}
        async def again(ask, step): return {"right": 0}
        async def raises(ask, step): raise KeyError("answers")
        async def hangs(ask, step): await asyncio.sleep(3600)
        async def late(ask, step): raise TimeoutError("of its own")
        async def text(ask, step): return "good"
        def plain(ask, step): return {"a": 1}
    """))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_evaluations_of_test", raising=False)
    return "own_evaluations_of_test"


def asked(path):
    async def ask(text, n=1):
        return [text] * n
    return ask


@pytest.mark.parametrize(("name", "said"), [
    ("again", "which another function returns too"), ("raises", "KeyError: 'answers'"), ("text", "str, not numbers"),
    ("hangs", "eval.function_timeout_s=0.2 is over"), ("late", "TimeoutError: of its own")])
def test_an_evaluation_of_ones_own_that_fails_costs_its_own_numbers_and_a_warning(name, said, own, messages):
    options = load([f"eval.functions=[{own}.right,{own}.{name}]", "eval.function_timeout_s=0.2"]).eval
    assert asyncio.run(own_evaluations(options, 5, asked)) == {"own/right": 7}
    (warning,) = messages()
    assert f"eval.functions: {own}.{name} gave no numbers after step 5: " in warning and said in warning


def test_an_evaluation_that_is_not_async_is_refused_before_the_start(own):
    check_evaluations(load([f"eval.functions=[{own}.right]"]).eval)
    with pytest.raises(ValueError, match=f"eval.functions={own}.plain is not async: write `async def`"):
        check_evaluations(load([f"eval.functions=[{own}.plain]"]).eval)
