"""Rows as the world has them, read as they are: packed, nested, with nulls, as lists, as chats that end answered."""

import gzip
import json
import math

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_rl.config.data import DataConfig
from megatron_rl.data import Limits, build_source, chains_tokenizer
from megatron_rl.data.benchmarks import read_benchmark
from megatron_rl.data.files import read_problems
from tests.megatron_rl.data.shipped import rows, write_hf, write_jsonl

ROWS = rows(3)
TEXTS = [row["prompt"] for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
LIST, PRETTY = json.dumps(ROWS).encode(), json.dumps(ROWS, indent=2).encode()
MARK = b"\xef\xbb\xbf"


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


def zstd_stream(data, folder):
    """A frame that does not say how long its content is, as `zstd < a > b` writes it."""
    with pa.CompressedOutputStream(str(folder / "s.zst"), "zstd") as file:
        file.write(data)
    return (folder / "s.zst").read_bytes()


def read(path, **keys):
    return read_problems(DataConfig(path=str(path), **keys))


@pytest.mark.parametrize("packed", ["plain", "gzip", "gzip in two parts", "zstd", "zstd stream"])
@pytest.mark.parametrize("text", [LINES, LIST, PRETTY, LINES.replace(b"\n", b"\r\n"), b"\n \n" + LINES, b" \n" + LIST],
                         ids=["lines", "list", "pretty list", "crlf", "blank lines first", "blanks, then a list"])
@pytest.mark.parametrize("mark", [b"", MARK], ids=["", "byte-order mark"])
def test_text_is_read_however_it_is_packed(packed, text, mark, tmp_path):
    data = mark + text
    data = {"plain": lambda: data, "gzip": lambda: gzip.compress(data), "zstd": lambda: zstd(data),
            "gzip in two parts": lambda: gzip.compress(data[:50]) + gzip.compress(data[50:]),
            "zstd stream": lambda: zstd_stream(data, tmp_path)}[packed]()
    (tmp_path / "problems.data").write_bytes(data)  # the name says nothing
    found = read(tmp_path / "problems.data")
    assert [problem.text for problem in found] == TEXTS and [problem.answer for problem in found] == ["1", "2", "3"]
    with_lines = text.strip().startswith(b"{")
    assert (":" in found.places[found[2].id]) == with_lines


@pytest.mark.parametrize("packed", [gzip.compress(LINES * 900)[:-40], zstd(LINES * 900)[:-10], gzip.compress(LINES)[:5],
                                    b"\x1f\x8b nonsense", b"\x28\xb5\x2f\xfd nonsense"],
                         ids=["gzip", "zstd", "gzip's head", "gzip's sign", "zstd's sign"])
def test_a_packed_file_that_is_cut_short_is_named(packed, tmp_path):
    (tmp_path / "cut.jsonl").write_bytes(packed)
    with pytest.raises(ValueError, match=r"cut.jsonl cannot be (unpacked|read to its end)"):
        read(tmp_path / "cut.jsonl")


@pytest.mark.parametrize(("text", "said"), [
    ("[1, {}]", r"row 1: a JSON int, not an object[\s\S]*row 2: no column"), ("[{]", "bad.jsonl row 1: not JSON"),
    ('[{"prompt": "1", "answer": "1"}', "bad.jsonl row 2: not JSON"),
    (f'[{{"prompt": {"9" * 5000}}}]', "bad.jsonl row 1: a whole number of more than 4,300 digits"),
    (f'[{"[" * 200_000}]', "bad.jsonl row 1: brackets in brackets"),
    (f'{{"prompt": {"9" * 5000}}}', "bad.jsonl:1: a whole number of more than 4,300 digits"),
    (f'{{"prompt": {"[" * 200_000}{"]" * 200_000}}}', "bad.jsonl:1: brackets in brackets"),
    (f'{{"x": {"[" * 900}{"]" * 900}, "prompt": 5}}', "bad.jsonl:1: "),
    ('{"prompt": "a", "answer": "\\ud800"}', "bad.jsonl:1: column 'answer' has half of a surrogate pair"),
    ('{"prompt": "a", "answer": "1", "x": [{"y": "\\udc00"}]}', "bad.jsonl:1: column 'x' has half of a surrogate pair"),
    ('{"prompt": "a", "answer": "1", "\\ud800": 1}', "bad.jsonl:1: column .* has half of a surrogate pair"),
    ('{"prompt": "a", "answer": NaN, "id": Infinity}', "bad.jsonl:1: .*id_key"),
    ('{"prompt": "a", "answer": Infinity}', "bad.jsonl:1: .*which is no number"),
    ("[\n{}\n{}]", r"bad.jsonl row 2: not JSON \(no comma before it, line 3\)"),
    ("[\n{}\n", r"bad.jsonl row 2: not JSON \(the list does not end, line 3\)"),
    ("[,{}]", "bad.jsonl row 1: not JSON"), ("[{},]", "bad.jsonl row 2: not JSON"),
    ("[\n{}\n]\n[\n{}\n]", "bad.jsonl: something follows the list, line 4"), ("[\n]\nx", "follows the list, line 3"),
    ('["a", "list"]\n{"prompt": "a", "answer": "1"}', "bad.jsonl:1: a JSON list, not an object"),
])
def test_what_cannot_be_read_is_named_with_file_and_row(text, said, tmp_path):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "bad.jsonl", id_key="id" if '"id"' in text else None)


def one(row, tmp_path, **keys):
    (problem,) = read(write_jsonl(tmp_path / "one.jsonl", [row]), **keys)
    return problem


@pytest.mark.parametrize(("answer", "text"), [
    (5, "5"), (5.0, "5"), (-0.5, "-0.5"), (True, "True"), (10 ** 40, str(10 ** 40)), (["5"], "5"),
    ([1, 2.5, "x"], "1, 2.5, x"),
    ("  5 ", "5"), (None, ""), (math.nan, ""), ([], ""), (1e300, "1e+300")])
def test_answers_are_numbers_texts_and_lists_of_them(answer, text, tmp_path):
    assert one({"prompt": "q", "answer": answer}, tmp_path).answer == text


@pytest.mark.parametrize("answer", [{"a": 1}, [[1]], [None], ["1", {}]])
def test_other_answers_are_bad_rows(answer, tmp_path):
    with pytest.raises(ValueError, match="neither text, a number, nor a list of them"):
        one({"prompt": "q", "answer": answer}, tmp_path)


def test_nested_columns_are_named_with_dots(tmp_path):
    row = {"extra": {"q": {"text": "1+1"}, "kind": "sums"}, "reward_model": {"ground_truth": "2", "style": None},
           "a.b": "own", "n": {"id": 7}}
    problem = one(row, tmp_path, prompt_key="extra.q.text", answer_key="reward_model.ground_truth", id_key="n.id",
                  domain_key="extra.kind", response_key="a.b")
    assert (problem.text, problem.answer, problem.domain, problem.id) == ("1+1", "2", "sums", "7")
    assert problem.response == "own"
    with pytest.raises(ValueError, match="no column 'extra.text' .data.prompt_key=extra.text."):
        one(row, tmp_path, prompt_key="extra.text")
    table = pa.Table.from_pylist([row, {**row, "reward_model": None, "n": {"id": 8}}])
    parquet.write_table(table, tmp_path / "nested.parquet")
    found = read(tmp_path / "nested.parquet", source="parquet", prompt_key="extra.q.text",
                 answer_key="reward_model.ground_truth", id_key="n.id")
    assert [(problem.id, problem.answer) for problem in found] == [("7", "2"), ("8", "")]


def test_a_null_is_an_absent_column(tmp_path):
    full = {"prompt": "q", "answer": "1", "kind": "hard", "name": "x", "worked": "so 1", "context": "import math"}
    empty = dict.fromkeys(full, None) | {"prompt": "p"}
    keys = {"domain_key": "kind", "id_key": "name", "response_key": "worked", "domain": "math"}
    for missing in (empty, {"prompt": "p"}, {**empty, "context": math.nan}):
        _, problem = read(write_jsonl(tmp_path / "two.jsonl", [full, missing]), **keys)
        assert (problem.domain, problem.id, problem.response, problem.answer) == ("math", "two.jsonl:2", None, "")
        assert problem.metadata == {}


@pytest.mark.parametrize("key", ["domain_key", "id_key", "response_key"])
def test_a_column_that_no_row_has_is_named(key, tmp_path):
    said = rf"no column 'kin' \(data.{key}=kin\); columns: .*; did you mean data.{key}=kind"
    with pytest.raises(ValueError, match=said):
        read(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "answer": "1", "kind": "x"}]), **{key: "kin"})


def test_tests_as_json_text_become_tests(tmp_path):
    tests = [{"input": "1", "output": "2"}]
    row = {"prompt": "q", "language": "Python3", "mode": "stdin", "tests": json.dumps(tests), "entry_point": None}
    problem = one(row, tmp_path, domain="code")
    assert problem.metadata == {"language": "Python3", "mode": "stdin", "tests": tests} and problem.answer == ""
    assert one({**row, "mode": "unit"}, tmp_path).metadata["tests"] == json.dumps(tests)  # source text
    with pytest.raises(ValueError, match="column 'tests' is text, but no JSON"):
        one({**row, "tests": "[{"}, tmp_path)


USER, SAID = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}


@pytest.mark.parametrize(("messages", "asked", "response"), [
    ([USER], [USER], None), ([USER, SAID], [USER], "2"),
    ([{"role": "system", "content": ""}, USER, SAID], [{"role": "system", "content": ""}, USER], "2"),
    ([USER, SAID, USER], [USER, SAID, USER], None), ([USER, SAID, USER, SAID], [USER, SAID, USER], "2"),
    ([{**USER, "name": None}, {**SAID, "tool": 1}], [USER], "2")])
def test_the_assistants_last_answer_is_no_part_of_the_prompt(messages, asked, response, tmp_path):
    keys = {"prompt_key": "messages", "template": "chat"}
    problem = one({"messages": messages, "answer": "2", "worked": "so 2"}, tmp_path, **keys)
    assert problem.text == tuple(asked) and problem.response == response
    assert one({"messages": messages, "answer": "2", "worked": "so 2"}, tmp_path, response_key="worked",
               **keys).response == "so 2"


@pytest.mark.parametrize("messages", [
    [SAID], [{"role": "system", "content": "x"}, SAID], [{"role": "user", "content": ""}], ["x"],
    [{"role": "system", "content": None}, USER], [{"role": "", "content": "x"}]])
def test_chats_without_a_question_are_bad_rows(messages, tmp_path):
    with pytest.raises(ValueError, match="bad line"):
        one({"prompt": messages, "answer": "2"}, tmp_path, template="chat")


def test_a_template_that_refuses_a_chat_names_the_row(tmp_path):
    tokenizer = chains_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}x"
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": [USER], "answer": "1"},
                                              {"prompt": [{"role": "system", "content": "s"}, USER], "answer": "1"}])
    with pytest.raises(ValueError, match=r"1 bad line[\s\S]*:2: .*chat template refuses the messages: user first"):
        build_source(DataConfig(path=str(path), template="chat"), tokenizer, Limits(100))


def write_parts(folder, names):
    """Each file holds its own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist([{"prompt": name, "answer": "1"}]), folder / name)
    return folder


HUB = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"]


@pytest.mark.parametrize(("names", "split", "expected"), [
    (HUB, "train", HUB[:2]), (HUB, "test", HUB[2:]), ([f"data/{name}" for name in HUB], "train",
                                                      [f"data/{name}" for name in HUB[:2]]),
    (["train.parquet", "validation.parquet"], "validation", ["validation.parquet"]),
    (["default/train/0000.parquet", "default/test/0000.parquet"], "train", ["default/train/0000.parquet"]),
    (["train_sft-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet"], "test_sft",
     ["test_sft-00000-of-00001.parquet"]),
    (["0.parquet", "1.parquet"], "train", ["0.parquet", "1.parquet"]), (HUB[2:], "train", HUB[2:]),
    (["part-00000-of-00002.parquet", "part-00001-of-00002.parquet"], "train",
     ["part-00000-of-00002.parquet", "part-00001-of-00002.parquet"]),
    ([*HUB, ".cache/train-00000-of-00002.parquet"], "train", HUB[:2])])
def test_a_folder_of_parquet_gives_one_split(names, split, expected, tmp_path):
    found = read(write_parts(tmp_path, names), source="parquet", hf_split=split)
    assert [problem.text for problem in found] == expected


@pytest.mark.parametrize(("names", "split", "said"), [
    (HUB, "validation", "data.hf_split=validation: .* has the splits test, train"),
    (["dev.parquet", "test.parquet"], "train", "data.hf_split=train: .* has the splits dev, test"),
    ([*HUB, "more.parquet"], "train", "holds the splits test, train, and more.parquet, whose names say no split"),
    (["a.parquet"], "test", "data.hf_split=test: .* has no splits to choose from")])
def test_a_split_that_is_not_there_or_not_clear_is_named(names, split, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read(write_parts(tmp_path, names), source="parquet", hf_split=split)


def test_a_split_of_what_has_none_is_refused(tmp_path):
    write_parts(tmp_path, ["a.parquet"])
    write_hf(tmp_path / "hf", ROWS)
    for source, path in (("parquet", tmp_path / "a.parquet"), ("hf_dataset", tmp_path / "hf")):
        assert len(read(path, source=source)) >= 1
        with pytest.raises(ValueError, match="data.hf_split=test: .* has no splits to choose from; leave it out"):
            read(path, source=source, hf_split="test")


def test_texts_of_a_table_that_are_no_utf8_are_named_by_row(tmp_path):
    offsets, letters = pa.array([0, 4, 5, 9], pa.int32()), pa.py_buffer(b"good\xfffine")
    texts = pa.StringArray.from_buffers(3, offsets.buffers()[1], letters)
    table = pa.table({"prompt": texts, "answer": ["1", "2", "3"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"1 bad line[\s\S]*a.parquet row 2: not UTF-8"):
        read(tmp_path / "a.parquet", source="parquet")
    assert len(read(tmp_path / "a.parquet", source="parquet", on_error="skip")) == 2


@pytest.mark.parametrize("packed", [lambda data: data, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
def test_benchmark_files_are_read_packed_and_with_a_mark(packed, tmp_path):
    (tmp_path / "aime.csv.gz").write_bytes(packed(MARK + b"problem,answer\n1+1,2\n"))
    (tmp_path / "aime.json").write_bytes(packed(MARK + b'[{"problem": "1+1", "answer": 2}]'))
    for name in ("aime.csv.gz", "aime.json"):
        (problem,) = read_benchmark(DataConfig(source="aime", path=str(tmp_path / name)))
        assert (problem.text, problem.answer) == ("1+1", "2")
