"""Model-aware difficulty through a real engine, from file to file."""

import json

import pytest

from megatron_rl import cli
from tests.megatron_rl.data.curation_sets import rates

pytestmark = pytest.mark.slow

MARKS = ("always", "never", "sometimes")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_always_and_never_solved_problems_are_found_and_a_stopped_command_goes_on(live_engine, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+1", "answer": "x", "solved": MARKS[i % 3]}) + "\n"
                            for i in range(48)))
    command = ["data", "difficulty", f"data.path={path}", f"model.path={live_engine.folder}", "--samples", "24",
               f"rollout.engine.urls=[{live_engine.process.base_url}]", "rollout.max_response_tokens=12",
               "reward.routes.math=tests.rewards.as_marked", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    kept, removed = read(tmp_path / "out" / "kept.jsonl"), read(tmp_path / "out" / "removed.jsonl")
    for why in ("always_solved", "never_solved"):
        wanted = {row["prompt"] for row in [*kept, *removed] if row["solved"] == why.removesuffix("_solved")}
        recall, precision = rates({row["prompt"] for row in removed if row["removed"]["why"] == why}, wanted)
        print(f"difficulty, {why}: recall {recall:.3f}, precision {precision:.3f} of {len(wanted)} in 48")
        assert (len(wanted), recall, precision) == (16, 1.0, 1.0)
    # 24 samples: that one of the 16 others seems always or never solved happens once in 500,000 times
    assert all(row["difficulty"]["samples"] == 24 and 0 < row["difficulty"]["pass_rate"] < 1 for row in kept)

    samples = tmp_path / "out" / "samples.jsonl"
    whole = samples.read_text()
    cut = whole.splitlines(keepends=True)[:32]
    samples.write_text("".join(cut) + '{"id": "in.js')  # killed while writing
    assert cli.main(command) == 0
    assert samples.read_text().startswith("".join(cut)) and len(read(samples)) == 49
    assert read(tmp_path / "out" / "kept.jsonl")[:10] == kept[:10]
    assert cli.main([*command, "--samples", "4"]) == 2  # of another run
