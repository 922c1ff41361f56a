"""Every task of reasoning-gym that is served: its own answers score 1, junk never does, and no answer is executed."""

import json
import re
from collections import deque

import pytest
from reasoning_gym.factory import DATASETS
from reasoning_gym.games.rush_hour import Board

from megatron_rl.data.gym import REFUSED, Gym
from megatron_rl.reward.gym import ReasoningGymScorer
from megatron_rl.reward.gym_answers import CHECKED, OWN, is_reference
from megatron_rl.types import Prompt, Score

TASKS = sorted(DATASETS.keys() - REFUSED.keys())
ITEMS = 3
CONFIGS = {"rush_hour": {"min_moves": 1, "max_moves": 4}, "boxnet": {"max_row_num": 2, "max_column_num": 3}}
JUNK = ["", " ", "nan", "NaN", "-nan", "nan+nanj", "inf", "-inf", "Infinity", "1e999", "1e-999", "0", "-0", "0.0", "1",
        "-1", "None", "null", "True False", "[]", "[[]]", "{}", "()", "''", '""', "[nan]", "[null]", "\u0661\u0662",
        "\uff10", "\u00bd", "?", ".*", "*", "x", "A", "C", "zoo", "oo", "I do not know", "not possible", "impossible",
        "the answer is above", "x" * 20000, "9" * 6000, "[" * 3000, "(" * 3000, "0 0 0", "0, 0", "0/0", "1/0", "a" * 50,
        "\x00", "Move", "U" * 5000, "\\frac{0}{0}", "0j", "lambda: 1", "Integral(x, x)"]


def items(task):
    source = Gym(task, CONFIGS.get(task, {}), size=ITEMS + 1, seed=3, split="all")
    problems = [source[i] for i in range(ITEMS + 1)]
    return [Prompt(p.id, (1,), p.text, p.answer, p.domain, p.metadata) for p in problems]


def value(prompt, answer):
    return ReasoningGymScorer().score(prompt, answer).value


def cheats(prompt, other):
    """What a policy could copy or derive: never the answer itself."""
    entry, answer = prompt.metadata["entry"], prompt.answer
    derived = [prompt.text, str(entry), json.dumps(entry["metadata"], default=str), str(entry["metadata"]),
               other.answer, f"{answer} or {other.answer}", f"{other.answer} or {answer}", f"not {answer}",
               f"{answer} {answer}", f"The answer is {answer}.", answer[:len(answer) // 4], f"{answer}\n{other.answer}"]
    if re.fullmatch(r"[0-9.]+", answer) and float(answer):
        derived += [f"-{answer}", f"1{answer}", f"{answer}e0x", f"[{answer}]"]
    task = prompt.metadata["task"]
    if task == "graph_color":  # the colours of another graph may do
        derived.remove(other.answer)
    return [text for text in derived if not same(task, text, answer)]


def same(task, text, answer):
    """Whether the text happens to be the answer, such as -0 for 0.0."""
    try:
        return is_reference(task, text, answer) or float(text) == float(answer)
    except ValueError:
        return False


def test_which_tasks_are_served():
    assert len(TASKS) >= 100 and {"codeio", "composite", "propositional_logic"} == REFUSED.keys()
    assert CHECKED.keys() | OWN.keys() <= set(TASKS)
    for task, why in REFUSED.items():
        with pytest.raises(ValueError, match=f"data.task={task} is refused: {re.escape(why)}"):
            Gym(task, {}, size=1, seed=0, split="all")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_junk_never_scores(task, tmp_path):
    proof = tmp_path / "executed"
    code = [text.format(f"__import__('pathlib').Path({str(proof)!r}).touch()") for text in
            ("{}", "[{}]", "({}, 24)[1]", "[str({})]", "1 + {}", "(lambda: {})()", "exec({!r})")]
    prompts, tried = items(task), 0
    for prompt, other in zip(prompts, prompts[1:], strict=False):
        junk = [text for text in [*JUNK, *code] if not same(task, text, prompt.answer)] + cheats(prompt, other)
        taken = [text[:80] for text in junk if value(prompt, text)]
        assert taken == [], (prompt.text, prompt.answer)
        tried += len(junk)
    assert tried >= 24 * ITEMS and not proof.exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_an_items_own_answer_scores_1(task):
    answered = [(prompt, prompt.answer or SOLVERS[task](prompt.metadata["entry"])) for prompt in items(task)]
    assert len(answered) == ITEMS + 1
    for prompt, answer in answered:
        assert value(prompt, f"so \\boxed{{{answer}}}") == value(prompt, f" {answer}\n") == 1.0, (prompt.text, answer)


def rush_hour(entry):
    """The first solution that a search over whole positions finds."""
    start = Board(entry["metadata"]["board_config"])
    seen, queue = {str(start)}, deque([()])
    while queue:
        moves = queue.popleft()
        for move in (f"{chr(ord('A') + i)}{step}" for i, piece in enumerate(start._pieces) if not piece.fixed
                     for step in ("+1", "-1")):
            board, path = Board(entry["metadata"]["board_config"]), (*moves, move)
            try:
                board.perform_moves(" ".join(path))
            except (ValueError, IndexError):
                continue
            if board.solved:
                return " ".join(path)
            if str(board) not in seen:
                seen.add(str(board))
                queue.append(path)
    raise AssertionError("no solution")


def boxnet(entry):
    """Each box along its row, then along its column, and into its target."""
    state, plan = entry["metadata"]["initial_state"], []
    place = {item: tuple(map(float, square.split("_"))) for square, found in state.items() for item in found}
    for box in (item for item in place if item.startswith("box_")):
        (row, column), goal = place[box], place[f"target_{box[4:]}"]
        while (row, column) != goal:
            here = f"Agent[{row}, {column}]"
            if row != goal[0]:
                row += 1 if goal[0] > row else -1
            else:
                column += 1 if goal[1] > column else -1
            plan.append({here: f"move({box}, square[{row}, {column}])"})
        plan.append({f"Agent[{row}, {column}]": f"move({box}, target_{box[4:]})"})
    return json.dumps(plan)


SOLVERS = {"rush_hour": rush_hour, "boxnet": boxnet}


def of(task, answer, **metadata):
    """A prompt of the task with this reference."""
    return Prompt("g", (1,), "", answer, "reasoning_gym", {"task": task, "task_config": {}, "entry": {
        "question": "", "answer": answer, "metadata": metadata}})


@pytest.mark.parametrize(("task", "reference", "metadata", "right", "wrong"), [
    ("coin_flip", "0.1640625", {}, ["0.1641", "21/128", ".1640625"], ["0", "0.1", "0.16", "21/0", "0.165", "21/128/1"]),
    ("coin_flip", "0.00003", {}, ["3/100000"], ["0", "0.0001"]),
    ("complex_arithmetic", "1.0 + 5.0i", {"result": [1, 5]}, ["1+5i", "(1 + 5j)"], ["nan", "5+1i", "1+5", "inf"]),
    ("gsm_symbolic", "9", {}, ["9.0", "+9", "09"], ["-9", "9 or 10", "9 apples, 3 pears", "19", "9/1"]),
    ("gsm_symbolic", "1200", {}, ["1,200", "1200.00"], ["1,2,0,0", "12,00", "1 200 3"]),
    ("number_sorting", "['-3.0', '32.6']", {"direction": "ascending"}, ["[-3, 32.6]", '["-3.0", "32.60"]'],
     ["[-2.5, 32.6]", "[-3, 33]", "[32.6, -3]", "[-3.0, 32.6, 40]", "[-3]", "[-3, nan]", "-3.0, 32.6"]),
    ("puzzle24", "8*(5*1 - 2)", {"numbers": [5, 1, 2, 8]}, ["(5*1-2) * 8", "(5 - 2)*8/1"],
     ["6*4*1*1", "24", "8*(5-2)", "8*(5*1-2)+0", "5+1+2+8", "8*(5*1--2)", "2**3*(5*1-2)", "8*(5*1-2).real", "51-28+1"]),
    ("countdown", "6*7", {"numbers": [6, 7], "target": 42}, ["7 * 6", "(6)*7"], ["42", "6*7*1", "6*8-6", "6//7", "67"]),
    ("game_of_life", "[[0,1],[1,0]]", {}, ["[[0, 1], [1, 0]]"],
     ["[[false,true],[true,false]]", "[[0,1,1],[1,0,0]]", "[[0,1],[1,0],[1,1]]", "[[0,1],[0,1]]", "[[0.0,1],[1,0]]"]),
    ("game_of_life_halting", "True", {}, ["true"], ["False", "yes", "True or False"]),
    ("figlet_font", "STRAWBERRY", {}, ["strawberry"], ["STRAWBERRIES", "STRAWBERRYS"]),
    ("rotate_matrix", "1 2\n3 4", {}, ["1 2 \n 3 4"], ["1 2 3 4", "1\n2\n3\n4", "3 4\n1 2"]),
    ("simple_integration", "X**2 + C", {"variable": "X", "integrand": "2*X"}, ["X**2", "C + X*X"],
     ["X**2 + X", "Integral(2*X, X)", "X**2.subs(X, X)", "2*X", "nan", "X**2 + __import__", "X**2 if 1 else 0"]),
    ("rubiks_cube", None, {"cube_size": 3, "scramble_moves": "U R"}, ["R' U'"], ["U R", "U'", "R'1000000 U'", "R2 U2"]),
    ("time_intervals", "44 days", {"task_type": "date"}, ["044 days"], ["44 days, 10:18:00", "44 apples", "45 days"]),
    ("sokoban", "RR", {"gamestr": "+ + + + +\n+ * @ X +\n+ + + + +\n"}, ["R"], ["the way is R", "L", "r1R"]),
])
def test_spellings_of_the_answer_count_and_its_neighbours_do_not(task, reference, metadata, right, wrong):
    prompt = of(task, reference, **metadata)
    assert [text for text in right if not value(prompt, text)] == []
    assert [text for text in wrong if value(prompt, text)] == []


def test_items_that_any_answer_or_none_solves_are_not_dealt():
    for task in ("simple_integration", "intermediate_integration"):
        source = Gym(task, {}, size=20, seed=3, split="all")
        answers = [source[i].answer for i in range(20)]
        assert not [text for text in answers if "Integral" in text or text.strip() in ("C", "0 + C")]
    source = Gym("graph_color", {}, size=20, seed=3, split="all")
    assert all(source[i].metadata["entry"]["metadata"]["puzzle"]["edges"] for i in range(20))
    source = Gym("polynomial_equations", {"min_degree": 2, "max_degree": 2}, size=20, seed=3, split="all")
    assert all(source[i].answer for i in range(20))


def chain_sum(**config):
    (problem,) = (Gym("chain_sum", config, size=1, seed=0, split="all")[i] for i in range(1))
    return Prompt(problem.id, (1,), problem.text, problem.answer, problem.domain, problem.metadata)


def test_full_marks_only():
    scorer, prompt = ReasoningGymScorer(), chain_sum(min_terms=2, max_terms=2)
    assert scorer.score(prompt, f"thus \\boxed{{{prompt.answer}}}.") == Score(1.0, "correct")
    # chain_sum's checker gives part marks to a text that holds the answer
    assert scorer.score(prompt, f"the answer is {prompt.answer}") == Score(0.0, "wrong")
    assert scorer.score(prompt, " ").status == scorer.score(prompt, "\\boxed{}").status == "no_answer"


def test_a_checker_that_raises_is_an_error_and_not_a_wrong_answer():
    score = ReasoningGymScorer().score(of("cryptarithm", "A=1"), "A=2")  # an entry without metadata
    assert score.status == "error" and score.detail.startswith("KeyError") and score.value == 0.0


def test_the_memo_key_holds_all_that_the_checker_reads():
    def key(prompt, response):
        return ReasoningGymScorer().prepare(prompt, response).memo_key

    prompt = chain_sum()
    assert key(prompt, "a \\boxed{3}") == key(chain_sum(), "b \\boxed{3}")
    assert key(prompt, "\\boxed{3}") != key(prompt, "\\boxed{4}")
    assert key(prompt, "\\boxed{3}") != key(chain_sum(min_terms=3), "\\boxed{3}")


def test_prompts_of_other_sources_are_refused():
    with pytest.raises(ValueError, match="reward.routes.math=reasoning_gym"):
        ReasoningGymScorer().prepare(Prompt("p", (1,), "question", "5", "math"), "\\boxed{5}")
