"""Benchmark files in their authors' own columns become problems that the rewards can judge."""

import base64
import csv
import json
import pickle
import zlib

import pytest

from megatron_rl.config.data import DataConfig
from megatron_rl.config.load import load
from megatron_rl.data.benchmarks import read_benchmark
from megatron_rl.data.chains import chains_tokenizer
from megatron_rl.data.sources import Limits, build_source
from megatron_rl.orchestrator.evaluation import evaluation_data


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(source, path, **keys):
    return read_benchmark(DataConfig(source=source, path=str(path), **keys))


def test_aime_answers_are_whole_numbers_without_leading_zeros(tmp_path):
    path = write(tmp_path / "aime.jsonl", [{"ID": "2024-I-1", "Problem": "p", "Answer": "033"},
                                           {"id": 60, "problem": "q", "answer": 204}])
    first, second = read("aime", path)
    assert (first.id, first.text, first.answer, first.domain) == ("2024-I-1", "p", "33", "math")
    assert (second.id, second.answer) == ("60", "204")
    write(path, [{"problem": "p", "answer": "1000"}, {"problem": "q", "answer": "1/2"}, {"answer": "1"}])
    with pytest.raises(ValueError, match=r"3 bad[\s\S]*:1: answer '1000'[\s\S]*:2: answer '1/2'[\s\S]*:3: no column"):
        read("aime", path)


def test_a_gsm8k_answer_is_the_number_after_the_solution(tmp_path):
    path = write(tmp_path / "gsm8k.jsonl", [
        {"question": "How much?", "answer": "He pays 2*600=<<2*600=1200>>1200.\n#### 1,200"},
        {"question": "How cold?", "answer": "Below #### 3 is -2.5\n#### -2.5 "}])
    assert [(each.text, each.answer) for each in read("gsm8k", path)] == [("How much?", "1200"), ("How cold?", "-2.5")]
    write(path, [{"question": "q", "answer": "42"}, {"question": "q", "answer": "#### many"}, {"answer": "#### 1"},
                 {"question": ["q"], "answer": "#### 1"}])
    with pytest.raises(ValueError, match=r"4 bad[\s\S]*:1: the answer does not end with ####[\s\S]*'many'[\s\S]*"
                                         r":3: no column question[\s\S]*:4: column question holds list"):
        read("gsm8k", path)


PUBLIC = {  # a row of each file that an experiment names, as it is published
    "data/gsm8k/train.jsonl": {"question": "1+1?", "answer": "So.\n#### 2"},
    "data/gsm8k/test.jsonl": {"question": "1+2?", "answer": "So.\n#### 3"},
    "data/deepscaler.json": {"problem": "Solve 1+3.", "answer": "4", "solution": "It is 4."},
    "data/aime24.jsonl": {"id": 60, "problem": "1+4?", "solution": "5", "answer": "5", "url": "", "year": "2024"},
    "data/aime25.jsonl": {"question": "1+5?", "answer": "6"},
}


@pytest.mark.parametrize(("experiment", "asked"), [
    ("gsm8k", {"": ("1+1?", "2"), "held-out": ("1+2?", "3")}),
    ("aime", {"": ("Solve 1+3.", "4"), "aime24": ("1+4?", "5"), "aime25": ("1+5?", "6")})])
def test_the_experiments_read_public_files_as_they_are_published(experiment, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, row in PUBLIC.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([row]) if path.suffix == ".json" else json.dumps(row) + "\n")
    tokenizer = chains_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    config = load([f"experiment={experiment}"])
    found = {}
    for name, data in {"": config.data, **evaluation_data(config)}.items():
        prompt = build_source(data, tokenizer, Limits()).prompt(0)
        assert prompt.domain in config.reward.routes and prompt.text.startswith("<user>")
        found[name] = (prompt.text, prompt.answer)
    assert found.keys() == asked.keys()
    assert all(text in found[name][0] and found[name][1] == answer for name, (text, answer) in asked.items())


def test_gpqa_options_keep_their_order_and_the_answers_letters_are_spread(tmp_path):
    columns = ["Record ID", "Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    with (tmp_path / "gpqa.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *([f"r{i}", f"Question {i},\nin two lines?", "right", "w1", "w2", "w3"]
                                     for i in range(80))])
    problems = read("gpqa", tmp_path / "gpqa.csv")
    assert problems == read("gpqa", tmp_path / "gpqa.csv") and problems[3].id == "r3"
    assert all(f"{problem.answer}) right\n" in problem.text for problem in problems)
    counts = [sum(problem.answer == letter for problem in problems) for letter in "ABCD"]
    assert min(counts) >= 8, counts


STDIN = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
CALL = [{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(value)))).decode()


def lcb(**columns):
    return {"question_id": "q1", "question_content": "Add.", "starter_code": "", "difficulty": "easy",
            "contest_date": "2024-08-01", "metadata": "{}", "public_test_cases": json.dumps(STDIN),
            "private_test_cases": packed(STDIN), **columns}


def test_livecodebench_tests_are_unpacked_into_the_columns_of_the_code_reward(tmp_path):
    path = write(tmp_path / "lcb.jsonl", [lcb(), lcb(
        starter_code="class Solution:\n    def add(self, a, b):\n", metadata=json.dumps({"func_name": "add"}),
        public_test_cases=json.dumps(CALL), private_test_cases=packed(CALL))])
    stdin, function = read("livecodebench", path)
    assert stdin.domain == "code" and stdin.metadata["mode"] == "stdin"
    assert stdin.metadata["tests"] == [{"input": "1 2\n", "output": "3\n"}] * 2
    assert function.metadata["mode"] == "function" and function.metadata["entry_point"] == "add"
    assert function.metadata["tests"] == [{"args": [[1, 2], 3], "expected": [4, 5]}] * 2
    assert "class Solution" in function.text and "standard input" in stdin.text


@pytest.mark.parametrize("columns", [
    {"starter_code": 5},
    *({"public_test_cases": value} for value in (5, True, {"a": 1}, "5", "null", '{"a": 1}', "[" * 9999)),
    *({"private_test_cases": base64.b64encode(zlib.compress(data)).decode()} for data in (
        pickle.dumps("5"), pickle.dumps(5), b"\x8e" + b"\xff" * 7 + b"\x7f"))])
def test_livecodebench_columns_of_another_kind_are_bad_rows(columns, tmp_path):
    with pytest.raises(ValueError, match=f"lcb.jsonl:1: .*{next(iter(columns))}"):
        read("livecodebench", write(tmp_path / "lcb.jsonl", [lcb(**columns)]))


def test_a_row_with_more_cells_than_the_header_is_bad(tmp_path):
    (tmp_path / "aime.csv").write_text("Problem,Answer\nWhat is 2+3?,5\nIf a=1, what is a?,1\nIf a=2, b=3, a+b?,5\n")
    with pytest.raises(ValueError, match=r"2 bad line.*\s.*row 2: 1 cell\(s\) more than the header.*\s.*row 3: 2 cell"):
        read("aime", tmp_path / "aime.csv")


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


def test_a_pickle_that_runs_something_is_refused(tmp_path, capsys):
    harmful = base64.b64encode(zlib.compress(pickle.dumps(Harmful()))).decode()
    path = write(tmp_path / "lcb.jsonl", [lcb(private_test_cases=harmful), lcb(private_test_cases="!"), lcb()])
    with pytest.raises(ValueError, match=r":1: .*it names builtins.print[\s\S]*:2: private_test_cases can be read"):
        read("livecodebench", path)
    assert capsys.readouterr().out == ""
    assert len(read("livecodebench", path, on_error="skip")) == 1
