"""The scorers by themselves: what counts as an answer, what as right, and which statuses come out."""

import random
import textwrap
import time
from pathlib import Path

import pytest

from megatron_rl.reward import boxed
from megatron_rl.reward.base import Job
from megatron_rl.reward.boxed import last_boxed
from megatron_rl.reward.exact import ExactScorer
from megatron_rl.reward.gym import ReasoningGymScorer
from megatron_rl.reward.math import MathVerifyScorer, judge_math
from megatron_rl.reward.route import Routes
from megatron_rl.reward.science import ScienceScorer
from megatron_rl.types import Prompt, Score


def prompt(answer, domain="math", **metadata):
    return Prompt("p", (1,), "question", answer, domain, metadata)


def status(scorer, answer, response, **metadata):
    score = scorer.score(prompt(answer, **metadata), response)
    assert score.value == (1.0 if score.status == "correct" else 0.0)
    return score.status


@pytest.mark.parametrize(("text", "box"), [
    ("so \\boxed{1} no, \\boxed{2}.", "2"),
    ("\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{1}{\\sqrt{2}}"),
    ("\\boxed {a{b}{c}}", "a{b}{c}"),
    ("\\boxed{\\boxed{3}}", "3"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{\\left\\{ 1 \\right.}", "\\left\\{ 1 \\right."),
    ("\\boxed{1} and \\boxed{2", "1"),
    ("} \\boxed{4}", "4"),
    ("\\boxed{}", ""),
    ("\\boxed{12", None), ("boxed{3}", None), ("the answer is 3", None), ("", None),
])
def test_the_last_closed_box_is_the_answer(text, box):
    assert last_boxed(text) == box


def test_a_text_of_open_boxes_costs_one_pass():
    start = time.process_time()
    assert last_boxed("\\boxed{" * 20000) is None
    assert time.process_time() - start < 3.0  # quadratic: 2 * 10^8 tokens


THOUGHTS = (  # response, what the prompt ends with, status
    ("<think>\\boxed{7}</think> I do not know.", "", "no_answer"), ("<think>so \\boxed{7}, or", "", "no_answer"),
    ("\\boxed{7}</think> I do not know.", "", "no_answer"), ("so \\boxed{7}, or", "<think>\n", "no_answer"),
    ("<think>\\boxed{8}</think>\\boxed{7}", "", "correct"), ("\\boxed{8}</think>\\boxed{7}", "<think>", "correct"),
    ("\\boxed{7}", "<think>\n\n</think>\n\n", "correct"), ("\\boxed{7}", "", "correct"),
    ("<think>\\boxed{7}</think>\\boxed{8}", "", "wrong"))


@pytest.mark.parametrize(("response", "end", "status"), THOUGHTS)
def test_what_is_thought_is_no_answer(response, end, status):
    asked = Prompt("p", (1,), f"What is 3+4?{end}", "7", "any", {"task": "dice", "task_config": {},
                                                                "entry": {"answer": "7"}})
    for scorer in (MathVerifyScorer(), ScienceScorer(0.01)):
        assert scorer.score(asked, response).status == status
    assert ReasoningGymScorer().score(asked, response).value == (status == "correct")


BREAKING = ("1" * 4400, "0." + "1" * 4400, "0.\\overline{" + "3" * 4400 + "}", "5" + "%" * 1000, "5" + "^\\circ" * 500,
            "10^{400}", "1e400 m", "3i m", "e^{i\\pi} m", "\\sqrt[i]{2} m", "5 delta_degC")


@pytest.mark.parametrize("scorer", [MathVerifyScorer(), ScienceScorer(0.01)], ids=["math", "science"])
def test_an_answer_that_breaks_the_arithmetic_is_wrong_and_no_failure_of_the_scorer(scorer):
    for answer in ("7", "9.8 m/s^2", "0.5", "25^\\circ C", "\\{1,2\\}", "(1,2)", "x=6"):
        assert {status(scorer, answer, f"\\boxed{{{box}}}") for box in BREAKING} == {"wrong"}


@pytest.mark.parametrize(("answer", "box"), [
    ("\\frac{1}{2}", "0.5"), ("1/2", "\\frac12"), ("1,234", "1234"), ("5", "x=5"), ("\\text{Paris}", "Paris"),
    ("\\{1,2\\}", "\\{2,1\\}"), ("[0,1)", "[0, 1)"), ("2\\sqrt{3}", "\\sqrt{12}"), ("\\pi/4", "0.785398"),
    ("x^2+2x+1", "(x+1)^2"), ("$3$", "3"), ("90^\\circ", "90"), ("5\\text{ cm}", "5"), ("3*x+6", "6+3x"),
    ("14", "14."), ("7", "007"), ("+5", "5"), ("no solution", "no solution"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}"),
])
def test_equal_expressions_are_correct(answer, box):
    assert status(MathVerifyScorer(), answer, f"so \\boxed{{{box}}}") == "correct"


@pytest.mark.parametrize(("answer", "box"), [
    ("12", "13"), ("-3", "3"), ("(1,2)", "(2,1)"), ("[0,1)", "(0,1)"), ("A", "B"), ("6", "6,7"), ("12", "12 or 13"),
    ("x+1", "x+2"), ("5", "five"),
])
def test_different_expressions_are_wrong(answer, box):
    assert status(MathVerifyScorer(), answer, f"so \\boxed{{{box}}}") == "wrong"


@pytest.mark.parametrize("response", ["the answer is 5", "5", "\\boxed{}", "\\boxed{ }", "\\boxed{5", ""])
def test_math_without_a_closed_box_is_no_answer_even_if_the_number_is_there(response):
    assert status(MathVerifyScorer(), "5", response) == "no_answer"


@pytest.mark.parametrize(("box", "answer"), [("7", "7"), ("007", "7"), ("+7", "7"), ("-7", "7"), ("8", "7"),
                                             ("\\frac{1}{2}", "\\frac{1}{2}"), ("no solution", "no solution")])
def test_the_shortcuts_agree_with_math_verify_and_need_no_worker(box, answer):
    decided = MathVerifyScorer().prepare(prompt(answer), f"\\boxed{{{box}}}")
    assert isinstance(decided, Score) and decided == judge_math(box, answer)


def test_equal_boxes_share_a_memo_key_and_other_answers_do_not():
    def key(answer, response):
        return MathVerifyScorer().prepare(prompt(answer), response).memo_key

    assert key("x+1", "one way \\boxed{1+x}") == key("x+1", "another \\boxed{ 1+x }")
    assert key("x+1", "\\boxed{1+x}") != key("x+2", "\\boxed{1+x}")
    assert key("x+1", "\\boxed{1+x}") != key("x+1", "\\boxed{2+x}")


@pytest.mark.parametrize(("response", "expected"), [
    (" 21", "correct"), ("21\n3 + 4 = 7", "correct"), ("\n21 ", "correct"), ("210", "wrong"), ("2 1", "wrong"),
    ("It is 21", "wrong"), ("", "no_answer"), (" \n", "no_answer")])
def test_exact_compares_the_first_line(response, expected):
    assert status(ExactScorer(), "21", response, domain="arithmetic") == expected


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_rewards_of_test.py").write_text(textwrap.dedent("""
        from megatron_rl.types import Score
        number = 3
        def longer_is_better(prompt, response_text): return len(response_text) / 10
        def own_status(prompt, response_text): return Score(0.25, "no_answer", prompt.id)
        def invented_status(prompt, response_text): return Score(1.0, "great")
        def not_a_number(prompt, response_text): return float("nan")
        def nothing(prompt, response_text): return None
        def raises(prompt, response_text): return {}["key"]
        def evaluated(prompt, response_text):
            import fractions, math, numpy, torch
            return eval(response_text)
    """))
    monkeypatch.syspath_prepend(tmp_path)
    return "user_rewards_of_test"


def user_score(path, response):
    scorer = Routes({"math": path}).scorer("math")
    assert isinstance(scorer.prepare(prompt("5"), response), Job)
    return scorer.score(prompt("5"), response)


def test_a_user_reward_may_return_a_number_or_a_score(user_module):
    assert user_score(f"{user_module}.longer_is_better", "12345") == Score(0.5, "graded", correct=False)
    assert user_score(f"{user_module}.longer_is_better", "1234567890") == Score(1.0, "correct")
    assert user_score(f"{user_module}.longer_is_better", "") == Score(0.0, "wrong")
    assert user_score(f"{user_module}.own_status", "12345") == Score(0.25, "no_answer", "p")


@pytest.mark.parametrize(("returned", "value"), [
    ("True", 1), ("False", 0), ("1", 1), ("0", 0), ("0.5", 0.5), ("-1", -1), ("numpy.float64(0.5)", 0.5),
    ("numpy.float32(0.5)", 0.5), ("numpy.float16(0.5)", 0.5), ("numpy.int64(1)", 1), ("numpy.uint8(1)", 1),
    ("numpy.bool_(True)", 1), ("numpy.bool_(False)", 0), ("numpy.array(0.5)", 0.5), ("numpy.ones(3).mean()", 1),
    ("numpy.array([1, 2]) is not None", 1), ("torch.tensor(0.5)", 0.5), ("torch.tensor(True)", 1),
    ("fractions.Fraction(1, 2)", 0.5), ("Score(numpy.float32(0.5), 'correct')", 0.5), ("Score(True, 'correct')", 1),
    ("Score(numpy.bool_(True), 'correct', '', numpy.bool_(True))", 1)])
def test_every_kind_of_one_number_is_a_reward_and_a_plain_float(user_module, returned, value):
    score = user_score(f"{user_module}.evaluated", returned)
    assert score.value == value and type(score.value) is float
    assert score.correct is (value == 1 or "correct" in returned)


@pytest.mark.parametrize("returned", [
    "None", "'1'", "'correct'", "[1.0]", "(1.0, 'correct')", "{}", "math.nan", "math.inf", "10**400", "1j",
    "numpy.float32('nan')", "numpy.array([1.0, 0.0])", "numpy.array([])", "torch.tensor([1.0, 0.0])", "print", "float",
    "Score(math.nan, 'correct')", "Score('1', 'correct')", "Score(None, 'correct')", "Score(1.0, None)",
    "Score(1.0, 'correct', None)"])
def test_what_is_not_one_finite_number_is_an_error(user_module, returned):
    score = user_score(f"{user_module}.evaluated", returned)
    assert score.status == "error" and score.value == 0.0 and score.detail


@pytest.mark.parametrize(("name", "detail"), [
    ("invented_status", "great"), ("not_a_number", "nan"), ("nothing", "None"), ("raises", "KeyError: 'key'")])
def test_a_user_reward_that_fails_is_an_error_that_says_why(user_module, name, detail):
    score = user_score(f"{user_module}.{name}", "12345")
    assert score.status == "error" and detail in score.detail


@pytest.mark.parametrize(("path", "reason"), [
    ("no_such_module_of_ours.score", "cannot import no_such_module_of_ours"), ("{}.absent", "absent"),
    ("{}.number", "not a function")])
def test_a_user_reward_that_cannot_be_used_names_its_route(user_module, path, reason):
    with pytest.raises(ValueError, match=rf"reward\.routes\.code={path.format(user_module)}.*{reason}"):
        Routes({"code": path.format(user_module)})


def test_an_unknown_scorer_and_a_missing_route_name_the_key():
    with pytest.raises(ValueError, match=r"reward\.routes\.math=math_verfy .* did you mean math_verify"):
        Routes({"math": "math_verfy"})
    routes = Routes({"math": "math_verify"})
    routes.check_domains(["math"])
    with pytest.raises(ValueError, match=r"reward\.routes\.code, reward\.routes\.science"):
        routes.check_domains(["science", "math", "code"])
    with pytest.raises(ValueError, match=r"reward\.routes\.code"):
        routes.scorer("code")


def test_the_quickstart_reward_example(monkeypatch):
    monkeypatch.syspath_prepend(Path("examples/quickstart").resolve())
    scores = [user_score("my_reward.score", text) for text in ("so\\boxed{5}", "2+2=4", "9", "hm")]
    assert [score.value for score in scores] == [1, 0.5, 0, 0] and scores[3].status == "no_answer"


def test_the_last_box_alone_is_looked_at_only_where_that_is_the_same():
    """Against one pass over the whole text, for texts of what can nest, escape and stay open."""
    rng, parts = random.Random(0), ["\\boxed{", "\\boxed", "\\boxed {", "{", "}", "\\", "\\\\", "a", " "]
    texts = ["".join(rng.choices(parts, k=rng.randrange(1, 12))) for _ in range(20_000)]
    found = [last_boxed(text) for text in texts]
    assert found == [boxed._last_boxed(text) for text in texts]
    assert sum(each is not None for each in found) > 2000
