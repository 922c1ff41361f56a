"""What counts as the same answer, over tables of pairs that were worked out by hand (right_pairs.tsv, wrong_pairs.tsv).

Each row: scorer, family, reference, answer, and why if it is not plain. None is misjudged.
"""

import csv
import logging
from collections import Counter
from pathlib import Path

import pytest

from megatron_rl.config.schema import Config, RewardConfig
from megatron_rl.data.curation.items import Item
from megatron_rl.data.problems import Problem
from megatron_rl.data.rows import Row
from megatron_rl.recipes.curation import verify
from megatron_rl.reward.base import Job
from megatron_rl.reward.math import MathVerifyScorer, judge_math
from megatron_rl.reward.science import ScienceScorer
from megatron_rl.types import Prompt

logging.getLogger("math_verify").setLevel(logging.CRITICAL + 1)
FOLDER = Path(__file__).parent
SCORERS = {"math": MathVerifyScorer(), "science": ScienceScorer(0.01)}


def table(name):
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


WRONG, RIGHT = table("wrong_pairs.tsv"), table("right_pairs.tsv")


def judged(scorer, reference, answer, question="question"):
    prompt = Prompt("p", (1,), question, reference, scorer)
    return SCORERS[scorer].score(prompt, f"It follows that \\boxed{{{answer}}}.")


def misjudged(rows, status):
    return [row for row in rows if judged(row[0], row[2], row[3]).status != status]


def test_the_tables_are_large_and_hold_no_row_twice():
    for rows in (WRONG, RIGHT):
        assert all(len(row) == 5 for row in rows) and len({row[:4] for row in rows}) == len(rows)
        assert Counter(row[0] for row in rows)["math"] >= 150 and Counter(row[0] for row in rows)["science"] >= 45
    assert not {row[:1] + row[2:4] for row in WRONG} & {row[:1] + row[2:4] for row in RIGHT}


def test_no_wrong_answer_is_right():
    assert misjudged(WRONG, "wrong") == []


def test_no_right_answer_is_wrong():
    assert misjudged(RIGHT, "correct") == []


def test_every_reference_accepts_itself_in_another_dressing():
    references = sorted({(row[0], row[2]) for row in (*WRONG, *RIGHT)})
    assert len(references) > 250
    assert [row for row in references if judged(*row, f"\\displaystyle {row[1]}").status != "correct"] == []


def test_what_is_wrong_in_one_dressing_is_wrong_in_all():
    dressings = ("${}$", "\\[{}\\]", "\\left.{}\\right.", "\\displaystyle{{{}}}", " {} .", "\\boxed{{{}}}")
    taken = [(dressing, row) for dressing in dressings for row in WRONG
             if judged(row[0], row[2], dressing.format(row[3])).value]
    assert taken == [] and len(WRONG) > 200


UNITS = (r"\text{ cm}", r"\,\mathrm{cm}", " cm", r"\text{ apples}", r"^\circ", r"\%", r"\text{ dollars}",
         r"\text{ m}^2", r"\ \mathrm{m\,s^{-1}}", r"\frac{\text{km}}{\text{h}}", r"^\circ\text{C}", r"\text{rd}")
BEHIND = ("+0", r"+0\text{ cm}", r"\cdot2", "-1", "/2", "!", "^0", "=6", "<6", r"\pm1", r"\text{ or }6",
          r"\text{ or 6}", " or 6", ", 6", r"\text{ and 6}", r"\text{ to }6", r"\to 6", r"\text{, not 6}",
          r"\text{ (or 6)}", r"\text{ plus }1", r"\text{ at least}", r"\text{ or more}", r"\text{ maybe}", "x",
          r"\text{ if }x>0", r"\text{ million}", r"\text{ halves}", r"\text{ divided by }2", r"\sqrt2", r"\bmod 3")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("scorer", SCORERS)
def test_nothing_may_follow_a_unit(scorer, unit):
    """It holds if the reference has the unit, and if it has none."""
    assert judged(scorer, f"5{unit}", f"5{unit}").value
    assert [behind for behind in BEHIND for reference in ("5", f"5{unit}")
            if judged(scorer, reference, f"5{unit}{behind}").value] == []


def test_a_job_is_made_of_what_can_travel_and_be_remembered():
    job = MathVerifyScorer().prepare(Prompt("p", (1,), "question", "\\frac12", "math"), "\\boxed{0.5}")
    other = MathVerifyScorer().prepare(Prompt("p", (1,), "is 0.5 it?", "\\frac12", "math"), "\\boxed{0.5}")
    assert isinstance(job, Job) and hash(job.memo_key) and job.memo_key != other.memo_key


COPIES = (  # question, reference, what stands in the question, the answer worked out
    ("Compute $2^{10}$.", "1024", "2^{10}", "1024"), ("What is 5!?", "120", "5!", "120"),
    ("Find $\\binom{10}{5}$.", "252", "\\binom{10}{5}", "252"),
    ("Simplify $\\sqrt{12}$.", "2\\sqrt3", "\\sqrt{12}", "2\\sqrt{3}"),
    ("Simplify $\\frac{6}{8}$.", "\\frac34", "\\frac{6}{8}", "\\frac{3}{4}"), ("Work out 24/6", "4", "24/6", "4"),
    ("Rationalise $\\frac{1}{\\sqrt2}$.", "\\frac{\\sqrt2}{2}", "\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}"),
    ("Expand $(x+1)^2$.", "x^2+2x+1", "(x+1)^2", "1+2x+x^2"),
    ("Factor $x^2-5x+6$.", "(x-2)(x-3)", "x^2-5x+6", "(x-3)(x-2)"),
    ("Write $x^2=25-y^2$ with 25 on one side.", "x^2+y^2=25", "x^2 = 25-y^2", "x^2+y^2=25"),
    ("Evaluate $\\sqrt[3]{27}$.", "3", "\\sqrt[3]{27}", "3"), ("What is \\(10^6\\)?", "1000000", "10^6", "1,000,000"))


@pytest.mark.parametrize(("question", "reference", "copy", "answer"), COPIES)
def test_what_stands_in_the_question_is_no_answer(question, reference, copy, answer):
    assert judged("math", reference, copy, question).status == "wrong"
    assert judged("math", reference, answer, question).status == "correct"


@pytest.mark.parametrize(("question", "reference", "copies"), [
    ("Expand $(x+1)^2$.", "x^2+2x+1", ["(x+1)^{2}", "(1+x)^2", "((x+1))^{2.0}", "(x+1)(x+1)", "1\\cdot(x+1)^2",
                                       "(x+1)^2+0", "\\frac{(x+1)^2}{1}", "-(-(x+1)^2)", "(-x-1)^2", "f(x)=(1+x)^2",
                                       "\\{(x+1)^2\\}", "(x+1)^{1+1}", "\\frac{(x+1)^3}{x+1}"]),
    ("Factor x^2-5x+6." + " Show each step of your work." * 50, "(x-2)(x-3)",
     ["x^{2}-5x+6", "6+x^2-5x", "x\\cdot x-5x+6", "x^2-(5x-6)", "1x^2-5x+6.0"]),
    ("What is $2^{10}$?", "1024", ["(2)^{10}", "2^{10.0}", "1\\cdot2^{10}"]),
    ("Simplify $\\sqrt{12}$.", "2\\sqrt3", ["12^{1/2}", "\\sqrt{12.0}", "\\sqrt[2]{12}", "1\\sqrt{12}"]),
    ("Write $x^2=25-y^2$ with 25 on one side.", "x^2+y^2=25", ["25-y^2=x^2", "x\\cdot x=-y^2+25"])])
def test_another_spelling_of_what_stands_in_the_question_is_no_answer(question, reference, copies):
    assert [copy for copy in copies if judged("math", reference, copy, question).value] == []
    assert all(judged("math", reference, copy, "Which?").value for copy in copies), "right, if the question lacks them"


@pytest.mark.parametrize(("question", "reference", "answer"), [
    ("Let $f(x)=x+1$. What is $xf(x)$?", "x^2+x", "x(x+1)"), ("Is it $2x+6$?", "2(x+3)", "2(3+x)"),
    ("Find $(x+1)^2$ for $x=2^3$.", "81", "3^4"), ("Is it $x+1$ or $y-1$? $\\frac{", "1+x", "x+1"),
    ("Which is larger, $\\frac12$ or $\\frac13$?", "\\frac12", "\\dfrac{1}{2}"),
    ("Which is prime: 21, 23, 25?", "23", "23"),
    ("Does $f$ increase or decrease?", "increase", "Increase"), ("Is it $x+1$ or $x-1$?", "x+1", "1+x"),
    ("Is the sum 0.5 or 0.7?", "\\frac12", "0.5"), ("Which of $\\sqrt2,\\sqrt3$ is larger?", "\\sqrt{3}", "\\sqrt3"),
    ("Which of (1,2) and (2,1) lies on the line?", "(1,2)", "(1, 2)"), ("Let $12+x=20$. Find x.", "8", "x=8")])
def test_an_answer_that_the_question_names_is_one(question, reference, answer):
    assert judged("math", reference, answer, question).status == "correct"


UNMEETABLE = (
    ("\\int_0^1 x^2 dx", "not worked out"), ("\\sum_{k=1}^{100} k", "not worked out"),
    ("\\lim_{x\\to 0}\\frac{\\sin x}{x}", "not worked out"), ("\\prod_{k=1}^4 k", "not worked out"),
    ("\\text{}", "nothing is left"), ("$$", "nothing is left"), ("\\,", "nothing is left"), ("\\frac{1}{2", "braces"),
    ("1}", "braces"), ("{", "braces"))


@pytest.mark.parametrize(("reference", "why"), UNMEETABLE)
def test_a_reference_that_no_answer_meets_does_not_accept_itself(reference, why):
    score = judge_math(reference, reference)
    assert score.value == 0 and why in score.detail
    for scorer in SCORERS:
        assert judged(scorer, reference, reference).value == 0


@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_data_verify_removes_exactly_the_references_that_no_answer_meets(scorer):
    met = sorted({row[2] for row in RIGHT if row[0] == scorer and row[1] != "words"})
    lost = [reference for reference, _ in UNMEETABLE]
    given = [Item(Row("", "", {}), Problem(str(i), "question", answer, "math"))
             for i, answer in enumerate([*met, *lost])]
    route = {"math": "math_verify", "science": "science"}[scorer]
    removed = verify(given, Config(reward=RewardConfig(routes={"math": route}, timeout_s=20))).removed
    assert len(met) > 30 and sorted(removed) == list(range(len(met), len(met) + len(lost)))
    assert {removal.why for removal in removed.values()} == {"unverifiable"}


LETTERED = ("A", "(A)", "A.", "A)", "A) newton", "(A) newton", "The answer is A.", "The answer is (A).", "**A**",
            "Answer: A", "Final answer: (A) newton", "so the correct option is A", "some words\n\nA", "\\boxed{A}",
            "\\boxed{\\text{A}}", "\\boxed{(A)}", "\\boxed{A) newton}", "\\boxed{\\textbf{(A) newton}}", "$A$",
            "B?\nThe answer is A")
UNLETTERED = ("B", "(B) newton", "The answer is B.", "A or B", "(A) and (B)", "A, B, C, D", "A) newton B) metre", "AB",
              "I do not know", "a newton is it", "newton", "Maybe A, but it could be B.", "A\nThe answer is B.",
              "\\boxed{B}",
              "\\boxed{A, B}", "\\boxed{}", "A is wrong\nD", "Between A and B I choose", "")


@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_a_letter_is_found_with_and_without_a_box(scorer):
    prompt = Prompt("p", (1,), "Which?\n\nA) newton\nB) metre", "A", scorer)
    assert [text for text in LETTERED if SCORERS[scorer].score(prompt, text).status != "correct"] == []
    assert [text for text in UNLETTERED if SCORERS[scorer].score(prompt, text).value] == []
