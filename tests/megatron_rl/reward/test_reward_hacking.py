"""A policy that boxes the question, or what it could have worked out but did not, earns nothing on any task we serve.

The policy is scripted: for a prompt it writes the question's own expression in every dressing below. The real
counterpart, 20 steps of RL from a policy that may do so, is in docs/rewards.md.
"""

import importlib
import logging
import re
from pathlib import Path

import pytest

from megatron_rl.config.data import DataConfig
from megatron_rl.data.arithmetic import Arithmetic
from megatron_rl.data.chains import Chains
from megatron_rl.data.files import read_problems
from megatron_rl.data.gym import Gym
from megatron_rl.reward.exact import ExactScorer
from megatron_rl.reward.gym import ReasoningGymScorer
from megatron_rl.reward.math import MathVerifyScorer
from megatron_rl.reward.science import ScienceScorer
from megatron_rl.types import Prompt, RolloutGroup

logging.getLogger("math_verify").setLevel(logging.CRITICAL + 1)
DRESSINGS = (
    "{}", "${}$", "\\({}\\)", "({})", "{{{}}}", "\\text{{{}}}", "\\mathrm{{{}}}", "\\displaystyle {}", "x={}", "{}=x",
    "{}=", "{}+0", "0+{}", "1\\cdot({})", "({})/1", "\\frac{{{}}}{{1}}", "+({})", "-(-({}))", "({})^1", "|{}|",
    "\\lfloor {}\\rfloor", "\\max({},{})", "\\sqrt{{({})^2}}", "\\{{{}\\}}", "[{}]",
    "\\begin{{pmatrix}}{}\\end{{pmatrix}}",
    "\\pm({})", "{}\\%", "({})^\\circ", "{}\\text{{ m}}", "{}, {}",
    "\\sum_{{k=1}}^1 ({})", "\\int_0^1 ({}) dx",
    "\\lim_{{x\\to0}}({})", "{}.")
GYM_TASKS = ("basic_arithmetic", "chain_sum", "products", "decimal_arithmetic", "decimal_chain_sum", "gcd", "lcm",
             "fraction_simplification", "power_function", "complex_arithmetic", "simple_equations",
             "polynomial_equations", "simple_integration", "intermediate_integration", "polynomial_multiplication",
             "base_conversion")


def every(problems):
    return [problems[index] for index in range(len(problems))]


def expressions(question):
    """The question's longest run of mathematics, and that run after one step of work."""
    runs = re.findall(r"[0-9(][0-9a-zA-Z().,/^*+\- ]*(?:[+\-*/^=(][0-9a-zA-Z().,/^*+\- ]*)+", question)
    runs += re.findall(r"\\frac\{[^{}]*\}\{[^{}]*\}", question)
    listed = re.findall(r"\d+(?:, \d+)+", question)
    runs += [f"\\{name}({listed[-1]})" for name in ("gcd", "lcm") if name in question.lower() and listed]
    found = [max(runs, key=len).strip(" .,?")] if runs else []
    for run in list(found):
        step = re.match(r"(\d+)([+-])(\d+)(?=[+-])", run)
        if step:
            total = int(step[1]) + int(step[2] + step[3])
            found += [f"{total}{run[step.end():]}", run.replace("+", " + ").replace("-", " - ")]
    return found


def dressed(question):
    return [dressing.replace("{}", "\0").format().replace("\0", run)
            for run in expressions(question) for dressing in DRESSINGS]


def taken(scorer, problems):
    """(problem, box) of all that earned something; how many boxes were judged."""
    found, judged = [], 0
    for problem in problems:
        prompt = Prompt("p", (1,), problem.text, problem.answer, problem.domain, problem.metadata)
        for box in dressed(problem.text):
            judged += 1
            if scorer.score(prompt, f"then \\boxed{{{box}}}").value:
                found.append((problem.text, problem.answer, box))
    return found, judged


def test_the_policy_boxes_what_the_question_says():
    assert expressions("Q:3+7-1-9\nA:") == ["3+7-1-9", "10-1-9", "3 + 7 - 1 - 9"]
    assert {"\\frac{3+7}{1}", "{3+7}", "\\{3+7\\}", "3+7"} <= set(dressed("Q:3+7\nA:"))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_quick_starts_prompts(split):
    found, judged = taken(MathVerifyScorer(), every(Chains(size=40, seed=7, split=split)))
    assert found == [] and judged > 3000


@pytest.mark.parametrize("scorer", [MathVerifyScorer(), ScienceScorer(0.01)], ids=["math", "science"])
@pytest.mark.parametrize("path", ["quickstart/problems.jsonl", "table3_domain_conflict/code.jsonl",
                                  "table3_domain_conflict/science.jsonl", "ring_lite_tiny/replay.jsonl"])
def test_the_shipped_problem_files(scorer, path):
    key = "problem" if path.startswith("quickstart") else "prompt"
    problems = read_problems(DataConfig(path=str(Path("examples") / path), prompt_key=key))[:20]
    found, judged = taken(scorer, problems)
    assert found == [] and judged > 500


def test_the_line_of_arithmetic():
    problems = every(Arithmetic(size=40, seed=7, split="train"))
    lines = [problem.text.splitlines()[-1].rstrip(" =") for problem in problems]
    for problem, line in zip(problems, lines, strict=True):
        prompt = Prompt("p", (1,), problem.text, problem.answer, "arithmetic")
        assert not any(ExactScorer().score(prompt, text).value for text in (line, f" {line} =", problem.text))
        assert not MathVerifyScorer().score(prompt, f"\\boxed{{{line}}}").value
    assert len(lines) == 40


@pytest.mark.parametrize("task", GYM_TASKS)
def test_the_served_mathematics_tasks(task):
    found, judged = taken(ReasoningGymScorer(), every(Gym(task, {}, size=5, seed=3, split="train")))
    assert found == [] and judged >= 2 * len(DRESSINGS)


@pytest.mark.parametrize("task", [task for task in GYM_TASKS if task != "base_conversion"])
def test_the_same_problems_under_the_mathematics_scorer(task):
    found, judged = taken(MathVerifyScorer(), every(Gym(task, {}, size=5, seed=3, split="train")))
    assert found == [] and judged >= 2 * len(DRESSINGS)


def test_the_shipped_policy_that_boxes_the_question(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path("examples/reward_hacking").resolve())
    boxing = importlib.import_module("boxing")
    boxing.main(str(tmp_path / "boxing.jsonl"))
    problems = read_problems(DataConfig(path=str(tmp_path / "boxing.jsonl"), response_key="response"))
    prompts = [Prompt("p", (1,), problem.text, problem.answer, "math") for problem in problems[:400]]
    scores = [MathVerifyScorer().score(prompt, problem.response)
              for prompt, problem in zip(prompts, problems, strict=False)]
    assert len(problems) == boxing.PROBLEMS and [score.value for score in scores] == [1.0, 0.0] * 200
    groups = [RolloutGroup(prompt, (), (problem.response,), (score,))
              for prompt, problem, score in zip(prompts, problems, scores, strict=False)]
    assert boxing.boxing(groups) == {"boxing_share": 0.5, "boxing_rewarded": 0.0}
