"""HumanEval's own verdicts: its canonical solutions pass, and the same solutions broken do not."""

import ast
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_rl.config.schema import RewardConfig
from megatron_rl.data.human_eval import HumanEval
from megatron_rl.reward.code import CodeScorer
from megatron_rl.types import Prompt, Score
from tests.sandboxes import needs_sandbox

WRONG = '''

def _changed(value):
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float)): return value + 1
    if isinstance(value, str): return value + "x"
    if isinstance(value, tuple): return (*value, 0)
    return 0 if value is None else [*value, 0] if isinstance(value, list) else None

def {name}(*arguments, _original={name}):
    return _changed(_original(*arguments))
'''


def verdicts(responses: list[str], problems: list) -> list[Score]:
    scorer = CodeScorer(RewardConfig())
    prompts = [Prompt(each.id, (1,), str(each.text), each.answer, each.domain, each.metadata) for each in problems]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(scorer.score, prompts, responses))


def test_it_is_all_there_and_every_solution_is_python():
    problems = HumanEval("all")
    assert len(problems) == 164 and len({problem.id for problem in problems}) == 164
    assert len(HumanEval("train")) + len(HumanEval("heldout")) == 164
    for problem in problems:
        ast.parse(problem.metadata["context"] + problem.answer)


@needs_sandbox
def test_a_completion_and_a_whole_function_are_both_judged():
    first = HumanEval("all")[:1]
    assert [score.status for score in verdicts([f"```python\n{first[0].answer}```"], first)] == ["correct"]
    assert [score.status for score in verdicts([first[0].response], first)] == ["correct"]


@pytest.mark.slow
@needs_sandbox
def test_canonical_solutions_score_164_of_164_and_broken_ones_0():
    problems = HumanEval("all")
    right = verdicts([problem.response for problem in problems], problems)
    broken = [f"{problem.response.removesuffix('```')}{WRONG.format(name=problem.metadata['entry_point'])}```"
              for problem in problems]
    wrong = verdicts(broken, problems)
    print(f"\nHumanEval: canonical {sum(score.value for score in right):.0f} of 164, "
          f"broken {sum(score.value for score in wrong):.0f} of 164")
    assert [problem.id for problem, score in zip(problems, right, strict=True) if score.value != 1] == []
    assert [problem.id for problem, score in zip(problems, wrong, strict=True) if score.value != 0] == []
    assert {score.status for score in wrong} <= {"wrong", "runtime_error"}
