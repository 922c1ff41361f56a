"""Metrics of the user's own: found by path before anything starts, refused if they say nonsense."""

import textwrap

import pytest

from megatron_rl.data.chains import answer_style
from megatron_rl.observe.own import OwnMetrics
from tests.megatron_rl.test_recipes import GROUPS


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_metrics_of_test.py").write_text(textwrap.dedent("""
        def words(groups): return {"words": sum(len(text.split()) for group in groups for text in group.texts)}
        def words_again(groups): return {"words": 1}
        def slash(groups): return {"a/b": 1}
        def text(groups): return {"a": "1"}
        number = 3
    """))
    monkeypatch.syspath_prepend(tmp_path)
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


@pytest.mark.parametrize(("names", "said"), [
    (["slash"], "without a slash"), (["text"], "an int or a float"), (["words", "words_again"], "another function")])
def test_what_is_no_metric_is_refused(module, names, said):
    with pytest.raises(ValueError, match=said):
        OwnMetrics([f"{module}.{name}" for name in names])(GROUPS)


def test_the_chains_task_tells_style_from_skill():
    """Three of six responses answer at once; one of the other three is right."""
    assert answer_style(GROUPS) == {"direct_share": 0.5, "reasoning_accuracy": pytest.approx(1 / 3)}
