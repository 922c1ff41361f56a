"""A small instance of every source that ships, for tests over the whole family."""

from __future__ import annotations

import csv
import json
import typing
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from megatron_rl.config.data import DataConfig

SOURCES = typing.get_args(typing.get_type_hints(DataConfig)["source"])
NUMBER = 80


def rows(number: int = NUMBER) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(number)]


def write_jsonl(path: Path, given: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return path


def write_hf(folder: Path, given: list[dict[str, Any]]) -> Path:
    """As datasets 5.2.0's Dataset.save_to_disk leaves a folder: Arrow streams, listed in state.json."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(given)
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    return folder


def write_gpqa(path: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Record ID", "Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))])
        writer.writerows([f"r{i}", f"Question {i}?", "right", "w1", "w2", "w3"] for i in range(NUMBER))
    return path


def keys_of(source: str, folder: Path) -> dict[str, Any]:
    """data.* of a working instance; its files are written into `folder`."""
    if source in ("jsonl", "aime"):
        given = [{"problem": row["prompt"], **row} for row in rows()]
        return {"path": str(write_jsonl(folder / f"{source}.jsonl", given))}
    if source == "function":
        return {"path": "tests.megatron_rl.data.shipped.rows"}
    if source == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows()), folder / "a.parquet")
        return {"path": str(folder / "a.parquet")}
    if source == "hf_dataset":
        return {"path": str(write_hf(folder / "hf", rows()))}
    if source == "gsm8k":
        return {"path": str(write_jsonl(folder / "gsm8k.jsonl", [
            {"question": row["prompt"], "answer": f"Add one: <<1+1=2>>.\n#### {row['answer']}"} for row in rows()]))}
    if source == "gpqa":
        return {"path": str(write_gpqa(folder / "gpqa.csv"))}
    if source == "livecodebench":
        return {"path": str(write_jsonl(folder / "lcb.jsonl", [
            {"question_id": str(i), "question_content": f"Add {i}.", "public_test_cases":
             [{"input": "1", "output": str(i + 1)}]} for i in range(NUMBER)]))}
    if source == "mix":
        part = DataConfig(source="jsonl", **keys_of("jsonl", folder))
        return {"mix": {"file": part, "sums": DataConfig(source="chains", size=NUMBER)}}
    return {"reasoning_gym": {"task": "chain_sum", "size": NUMBER}, "chains": {"size": NUMBER},
            "arithmetic": {"size": NUMBER}, "human_eval": {}}[source]
