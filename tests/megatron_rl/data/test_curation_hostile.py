"""Curation survives its own input, looks at no text for long, and does not take ordinary problems for bad ones."""

import json
import time
from datetime import date
from decimal import Decimal

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_rl import cli
from megatron_rl.config.data import DataConfig
from megatron_rl.config.load import load
from megatron_rl.data.curation import items as items_module
from megatron_rl.data.curation.clean import clean
from megatron_rl.data.curation.contamination import decontaminate
from megatron_rl.data.curation.items import Removal, Split, read_items, write_split
from megatron_rl.data.problems import Problem
from megatron_rl.recipes.curation import verify
from tests.megatron_rl.data.curation_sets import GOOD, UNUSABLE, Item, Row, items, rates
from tests.megatron_rl.data.provocations import KNOWN, UNSEEN

GOOD_ROW = json.dumps({"prompt": "What is 1 + 1?", "answer": "2"})
HOSTILE = {
    "half a surrogate": '{"prompt": "What is 2 + 2?", "answer": "4", "source": "\\ud83d"}',
    "half a surrogate in the answer": '{"prompt": "What is 2 + 2?", "answer": "\\udfff"}',
    "5,000 digits": f'{{"prompt": "What is 2 + 2?", "answer": {"7" * 5000}}}',
    "5,000 digits elsewhere": f'{{"prompt": "What is 2 + 2?", "answer": "4", "meta": {{"seed": {"7" * 5000}}}}}',
    "200,000 brackets": f'{{"prompt": "What is 2 + 2?", "answer": "4", "meta": {"[" * 200_000}{"]" * 200_000}}}',
    "infinity": '{"prompt": "What is 2 + 2?", "answer": "4", "score": Infinity}',
    "bytes that are no text": b'{"prompt": "\xff", "answer": "4"}',
    "cut short": '{"prompt": "What is 2 + 2?", "ans',
}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("step", [["clean"], ["dedup"], ["decontaminate", "--against", "jsonl:{good}"], ["verify"]],
                         ids=lambda step: step[0])
def test_each_hostile_row_is_named_and_the_outputs_are_whole_or_absent(name, step, tmp_path, capsys):
    path, good, out = tmp_path / "in.jsonl", tmp_path / "good.jsonl", tmp_path / "out"
    hostile = HOSTILE[name] if isinstance(HOSTILE[name], bytes) else HOSTILE[name].encode()
    path.write_bytes(GOOD_ROW.encode() + b"\n" + hostile + b"\n")
    good.write_text('{"prompt": "Another problem of some length", "answer": "1"}\n')
    arguments = [text.format(good=good) for text in step] + [f"data.path={path}", "--out", str(out),
                                                            "reward.routes={math: exact}"]
    if step[0] != "clean":
        assert cli.main(["data", *arguments]) == 2
        assert f"{path}:2: " in capsys.readouterr().err and not out.exists()
    assert cli.main(["data", *arguments, "data.on_error=skip"]) == 0
    assert lines(out / "kept.jsonl") == [json.loads(GOOD_ROW)]
    (removed,) = lines(out / "removed.jsonl")
    assert removed["removed"]["why"] == "bad_row" and removed["removed"]["from"] == f"{path}:2"
    assert json.loads((out / "report.json").read_text()) == {"read": 2, "kept": 1, "bad_row": 1}
    assert sorted(file.name for file in out.iterdir()) == ["kept.jsonl", "removed.jsonl", "report.json"]


def test_what_tables_hold_is_written_as_json_or_named(tmp_path):
    rows = [{"prompt": "1+1", "answer": "2", "day": date(2026, 1, 2), "price": Decimal("1.50"), "score": float("nan"),
             "nested": {"x": [float("nan"), 1.0]}, "image": None},
            {"prompt": "2+2", "answer": "4", "day": None, "price": None, "score": 1.0, "nested": None,
             "image": b"\x89PNG"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    config = DataConfig(source="parquet", path=str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"a.parquet row 2: it holds bytes \(b'.x89PNG'\), which JSON lines cannot"):
        read_items(config)
    given, bad = read_items(DataConfig(source="parquet", path=str(tmp_path / "a.parquet"), on_error="skip"))
    write_split(tmp_path / "out", Split(given, {}), bad)
    (kept,) = lines(tmp_path / "out" / "kept.jsonl")
    assert kept == {**rows[0], "day": "2026-01-02", "price": "1.50", "score": None, "nested": {"x": [None, 1.0]}}


@pytest.mark.parametrize("fails_at", range(3))
def test_a_step_that_fails_while_writing_leaves_what_was_there(fails_at, tmp_path, monkeypatch):
    given = items(["a", "b"])
    write_split(tmp_path / "out", Split(given, {}))
    before = {file.name: file.read_text() for file in (tmp_path / "out").iterdir()}
    assert len(before) == 3
    calls = []

    def fail(row):
        calls.append(row)
        if len(calls) > fails_at:
            raise ValueError("no more")
        return "x\n"

    monkeypatch.setattr(items_module, "_line", fail)
    with pytest.raises(ValueError, match="no more"):
        write_split(tmp_path / "out", Split([*given, *items(["c"])], {0: Removal("x")}))
    assert {file.name: file.read_text() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("name", ["kept.jsonl", "removed.jsonl", "report.json"])
def test_a_file_that_cannot_be_written_leaves_the_others_as_they_were(name, tmp_path):
    write_split(tmp_path, Split(items(["a", "b"]), {}))
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert len(before) == 3
    (tmp_path / f"{name}.partial").mkdir()
    with pytest.raises(OSError):
        write_split(tmp_path, Split(items(["c"]), {}))
    assert {file: (tmp_path / file).read_text() for file in before} == before


PIECES = ["(", "[", "{", "![", "\\text{", " (a) ", "A. ", "1. \n", "1.", "http://", "figure ", "figure   ", "<", "$",
          "as shown", " ", "\n", "of the figure ", "true", "which of ", "part A ", "\\\\", "*", "9", "\u4e2d",
          "show that ", "choose the ", " \t", "(i) ", "in the following "]


@pytest.mark.parametrize("piece", PIECES)
def test_no_text_is_looked_at_for_long(piece):
    text = piece * (200_000 // len(piece))
    started = time.process_time()
    given = items([(text, "7"), ("What is 1 + 1?", text)])
    clean(given)
    decontaminate(given, [Problem("b", "What is the sum of all the numbers from one to ten, and why?", "55", "math")])
    assert time.process_time() - started < 8


def test_ordinary_problems_stay():
    assert {KNOWN[place][0]: removal for place, removal in clean(items(KNOWN)).removed.items()} == {}
    removed = clean(items(UNSEEN)).removed
    assert [UNSEEN[place][0][:24] for place in removed] == ["The picture shown to 8 p", "Which of the following t"]
    unusable = [problem for problems in UNUSABLE.values() for problem in problems]
    everything = [*unusable, *GOOD, *KNOWN, *UNSEEN]
    recall, precision = rates(set(clean(items(everything)).removed), set(range(len(unusable))))
    print(f"clean: recall {recall:.3f}, precision {precision:.3f} of {len(unusable)} in {len(everything)}")
    assert recall == 1.0 and precision >= 0.94


PHRASES = [
    "Find x.", "What is the answer?", "What is the area of the shaded region?", "Find the value of the expression.",
    "What is the area of the shaded region in the figure?", "Solve the equation.", "How many are there in total?",
    "Compute the sum of the first n terms of the sequence and simplify your answer.",
]
ORDINARY = [
    "A circle of radius 2 lies in a square of side 4. What is the area of the shaded region?",
    "Let 2x + 3 = 11. Find x.", "Ann has 3 red and 4 blue balls and buys 5 more. How many are there in total?",
    "If a = 3 and b = 5, what is a + b? What is the answer?",
    "For n = 3, a = 2 and b = 7 take a^n - b. Find the value of the expression.",
    "A triangle with legs 3 and 4 is cut from a square of side 5. What is the area of the shaded region in the figure?",
    "Let x^2 = 9 with x > 0. Solve the equation.",
    "A sequence begins with 2, 5, 8 and goes on like this. Compute the sum of the first n terms of the sequence and "
    "simplify your answer.",
]


def test_a_phrase_that_is_a_whole_benchmark_problem_removes_nothing_else():
    benchmark = [Problem(f"b{i}", text, "1", "math") for i, text in enumerate(PHRASES)]
    assert decontaminate(items(ORDINARY), benchmark).removed == {}
    assert len(decontaminate(items(PHRASES[1:]), benchmark).removed) == len(PHRASES) - 1  # all but "Find x."


@pytest.mark.parametrize(("benchmark", "problem"), [
    ("Compute 17*23 - 4.", "Please compute 17*23 - 4."),
    ("Compute 17*23 - 4.", "Compute 17*23 - 4. Reason step by step, and put the final answer within \\boxed{}."),
    ("Let x = 3. Find 2x + 5.", "Think. Let x = 3. Find 2x + 5. Then write the result in a box, with no other text."),
    ("What is 2+2?", "You are a careful assistant.\nWhat is 2+2?\nAnswer with a number and nothing else."),
])
def test_a_short_benchmark_problem_is_found_with_what_surrounds_it(benchmark, problem):
    assert decontaminate(items([problem]), [Problem("b", benchmark, "1", "math")]).removed.keys() == {0}


def test_a_longer_sum_is_another_problem():
    given = items(["What is 2+2*3 when the product comes first, as it always does in this country?"])
    assert decontaminate(given, [Problem("b", "What is 2+2?", "4", "math")]).removed == {}


def of(domain, answer, response=None, **metadata):
    name = f"set.jsonl:{domain}"
    return Item(Row(name, name, {}), Problem(name, "q", answer, domain, metadata, response))


GYM = {"task": "chain_sum", "task_config": {}, "entry": {"question": "1+1", "answer": "2", "metadata": {}}}


@pytest.mark.slow
def test_every_scorer_is_asked_whether_it_accepts_its_own_reference():
    routes = "reward.routes={m: math_verify, s: science, e: exact, g: reasoning_gym, c: code}"
    code = {"language": "python", "mode": "stdin", "tests": [{"input": "1", "output": "2"}]}
    given = [of("m", "7"), of("m", "\\frac{1}{"), of("m", ""), of("s", "5 km"), of("s", "\\frac{1}{"), of("e", "a\nb"),
             of("e", " "), of("g", "2", **GYM), of("g", "3", **GYM), of("g", "2"), of("c", "", **code),
             of("c", "", "```python\nprint(int(input())+1)\n```", **code),
             of("c", "", "```python\nprint(3)\n```", **code),
             of("c", "", language="python"), of("m", "7", "so \\boxed{8}")]
    removed = verify(given, load([routes, "reward.sandbox=unsafe"])).removed
    assert {place: removal.why for place, removal in removed.items()} == {
        1: "unverifiable", 2: "unjudgeable", 4: "unverifiable", 6: "unjudgeable", 8: "unverifiable", 9: "unjudgeable",
        12: "response_fails", 13: "unjudgeable", 14: "response_fails"}
