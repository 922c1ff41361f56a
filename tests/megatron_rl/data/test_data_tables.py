"""Parquet files, Hugging Face datasets on a disk, and what data.on_error=skip leaves out."""

import json
import logging

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_rl.config.schema import DataConfig
from megatron_rl.data import Limits, build_source, chains_tokenizer

ROWS = [{"prompt": "3+4", "answer": "7", "kind": "easy"}, {"prompt": "9-4", "answer": "5", "kind": "hard"},
        {"prompt": "1+1", "answer": "2", "kind": "easy"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chains_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_parquet(path, rows):
    parquet.write_table(pa.Table.from_pylist(rows), path)


def write_hf(folder, rows, files=2):
    """As datasets 5.2.0's Dataset.save_to_disk leaves a folder: Arrow streams, listed in state.json."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        table = pa.Table.from_pylist(rows[i * len(rows) // files:(i + 1) * len(rows) // files])
        with pa.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def load(source, path, tokenizer, **keys):
    return build_source(DataConfig(source=source, path=str(path), **keys), tokenizer, Limits(max_prompt_tokens=8))


def contents(source):
    return [(p.text, p.answer, p.domain) for p in map(source.prompt, range(len(source)))]


EXPECTED = [(row["prompt"], row["answer"], row["kind"]) for row in ROWS]


def test_every_format_holds_the_same_problems(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    write_parquet(tmp_path / "a.parquet", ROWS)
    (tmp_path / "parts").mkdir()
    for i, row in enumerate(ROWS):
        write_parquet(tmp_path / "parts" / f"{i}.parquet", [row])
    write_hf(tmp_path / "one", ROWS)
    write_hf(tmp_path / "dict" / "test", ROWS)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for source, name, keys in (("jsonl", "a.jsonl", {}), ("parquet", "a.parquet", {}), ("parquet", "parts", {}),
                               ("hf_dataset", "one", {}), ("hf_dataset", "dict", {"hf_split": "test"})):
        assert contents(load(source, tmp_path / name, tokenizer, domain_key="kind", **keys)) == EXPECTED, name


def test_a_missing_split_names_those_that_are_there(tmp_path, tokenizer):
    write_hf(tmp_path / "test", ROWS)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(ValueError, match="data.hf_split=train: .* has the splits test"):
        load("hf_dataset", tmp_path, tokenizer)
    with pytest.raises(ValueError, match="no state.json"):
        load("hf_dataset", tmp_path.parent, tokenizer)


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"_data_files": [1], "splits": 1}'])
def test_a_folder_whose_own_files_are_garbled_is_named(name, text, tmp_path, tokenizer):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} is not as Dataset.save_to_disk writes it"):
        load("hf_dataset", tmp_path, tokenizer)


def test_every_bad_row_of_a_table_is_listed(tmp_path, tokenizer):
    write_parquet(tmp_path / "a.parquet", [{"prompt": "3+4", "answer": "7"}, {"prompt": "", "answer": "7"},
                                           {"prompt": None, "answer": "2"}])
    with pytest.raises(ValueError, match=r"2 bad line[\s\S]*a.parquet row 2: .*empty[\s\S]*row 3: .*holds NoneType"):
        load("parquet", tmp_path / "a.parquet", tokenizer)
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(ValueError, match="b.parquet is not a Parquet file"):
        load("parquet", tmp_path / "b.parquet", tokenizer)


def test_skip_leaves_bad_and_long_rows_out_and_says_how_many(tmp_path, tokenizer, caplog):
    rows = [*ROWS, {"prompt": "1+1", "answer": {}}, {"prompt": "1" * 9, "answer": "1"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    with caplog.at_level(logging.WARNING):
        source = load("jsonl", tmp_path / "a.jsonl", tokenizer, on_error="skip")
    assert [text for text, *_ in contents(source)] == [row["prompt"] for row in ROWS]
    assert "2 bad line(s)" in caplog.text and "a.jsonl:4: " in caplog.text and "a.jsonl:6: not JSON" in caplog.text
    assert "1 bad line(s)" in caplog.text and "a.jsonl:5: 9 tokens" in caplog.text
