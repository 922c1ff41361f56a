"""Metrics of the user's own: found by path before anything starts, and unable to end a run."""

import sys
import textwrap

import pytest

from megatron_rl.data.chains import answer_style
from megatron_rl.foreign import load_function
from megatron_rl.observe.own import OwnMetrics, show_rollouts
from tests.megatron_rl.test_recipes import GROUPS


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_metrics_of_test.py").write_text(textwrap.dedent("""
        def words(groups): return {"words": sum(len(text.split()) for group in groups for text in group.texts)}
        def words_again(groups): return {"words": 1}
        def slash(groups): return {"a/b": 1}
        def text(groups): return {"a": "1"}
        def infinite(groups): return {"a": float("inf")}
        def none(groups): return None
        def raises(groups): raise KeyError("answers")
        def shown(step, groups): seen.append((step, len(groups)))
        def not_shown(step, groups): raise OSError("disk full")
        seen = []
        number = 3
    """))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_metrics_of_test", raising=False)
    return "own_metrics_of_test"


def test_functions_see_the_judged_groups(module):
    assert OwnMetrics([f"{module}.words"])(GROUPS) == {"words": 7}
    assert OwnMetrics([])(GROUPS) == {}


@pytest.mark.parametrize(("paths", "said"), [
    (["{}.absent"], "observe.metrics=own_metrics_of_test.absent: .* has no absent"),
    (["nowhere.at_all"], "cannot import nowhere .*PYTHONPATH"), (["words"], "must be package.module.function"),
    (["{}.number"], "is not a function")])
def test_a_path_that_leads_nowhere_is_refused_at_once(module, paths, said):
    with pytest.raises(ValueError, match=said):
        OwnMetrics([path.format(module) for path in paths])


@pytest.mark.parametrize(("name", "said"), [
    ("slash", "without a slash"), ("text", "no finite number"), ("infinite", "no finite number"),
    ("none", "NoneType, not numbers by name"), ("words_again", "another function"), ("raises", "KeyError: 'answers'")])
def test_a_metric_that_fails_costs_its_own_numbers_and_a_warning(module, name, said, messages):
    assert OwnMetrics([f"{module}.words", f"{module}.{name}"])(GROUPS) == {"words": 7}
    (warning,) = messages()
    assert f"observe.metrics: {module}.{name} gave no numbers: " in warning and said in warning


def test_a_function_that_is_shown_rollouts_cannot_end_the_run(module, messages):
    show_rollouts([f"{module}.not_shown", f"{module}.shown"], 3, GROUPS)
    assert messages() == [f"observe.rollouts: {module}.not_shown failed at step 3: OSError: disk full"]
    assert load_function("observe.rollouts", f"{module}.shown").__globals__["seen"] == [(3, len(GROUPS))]


def test_the_chains_task_tells_style_from_skill():
    """Three of six responses answer at once; one of the other three is right."""
    assert answer_style(GROUPS) == {"direct_share": 0.5, "reasoning_accuracy": pytest.approx(1 / 3)}
