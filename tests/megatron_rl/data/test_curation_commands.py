"""`megatron-rl data STEP` from file to file."""

import json

import pytest

from megatron_rl import cli
from megatron_rl.config.load import load
from megatron_rl.recipes.curation import Sampled, difficulty, verify
from tests.megatron_rl.data.curation_sets import GOOD, UNUSABLE, items, rates


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_steps_follow_one_another_and_lose_no_row(tmp_path):
    rows = [{"prompt": text, "answer": answer} for text, answer in [*GOOD, *UNUSABLE["image"], GOOD[0]]]
    source = write(tmp_path / "all.jsonl", [*rows, {"prompt": "no answer"}])
    bench = write(tmp_path / "aime.jsonl", [{"problem": GOOD[3][0], "answer": 4}])
    steps = [["clean"], ["dedup"], ["decontaminate", "--against", f"aime:{bench}", "--ngram", "6"]]
    gone = []
    for name, *options in steps:
        assert cli.main(["data", name, f"data.path={source}", "--out", str(tmp_path / name), *options]) == 0
        source = tmp_path / name / "kept.jsonl"
        gone += [row["removed"]["why"] for row in read(tmp_path / name / "removed.jsonl")]
    assert len(read(source)) + len(gone) == len(rows) + 1
    assert sorted(gone) == ["contaminated", "exact_duplicate", *["image"] * len(UNUSABLE["image"]), "no_answer"]
    assert read(source)[0] == rows[0]


@pytest.mark.parametrize(("arguments", "message"), [
    (["dedup", "data.source=chains", "--out", "x"], "data.source=chains is not a file: curation reads jsonl"),
    (["decontaminate", "data.path={path}", "--against", "nonsense", "--out", "x"],
     "--against nonsense: write KIND:FILE"),
    (["dedup", "data.path={path}", "--threshold", "2", "--out", "x"], "threshold=2.0 must lie in"),
])
def test_wrong_input_is_named(arguments, message, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1+1", "answer": "2"}])
    assert cli.main(["data", *(text.format(path=path) for text in arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_answers_that_cannot_be_verified_go():
    good = ["7", "\\frac{1}{2}", "(1,2)", "\\{1,2\\}", "[0,1)", "1,000", "x^2+1", "12\\%", "5\\text{ cm}", "90^\\circ",
            "\\text{blue}", "-\\infty", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "10\\sqrt{3}", "x=3"]
    bad = {"\\frac{1}{": "unverifiable", "the answer depends on n": "prose_answer", "}{": "unverifiable",
           "not enough information": "prose_answer", "$": "unverifiable"}
    given = items([("q", answer) for answer in [*good, *bad]])
    removed = verify(given, load([])).removed
    expected = {len(good) + i: why for i, why in enumerate(bad.values())}
    recall, precision = rates(set(removed), set(expected))
    print(f"verify: recall {recall:.3f}, precision {precision:.3f} of {len(expected)} in {len(given)}")
    assert {place: removal.why for place, removal in removed.items()} == expected


def sampled(values, boxed):
    return Sampled(tuple(map(bool, values)), tuple(boxed))


def test_models_speak_against_an_answer_only_together():
    config = load(["reward.routes={math: exact}"])
    given = items(["a", "b", "c", "d"])
    samples = [sampled([0, 0, 0, 0], ["2", "2", "2", "9"]), sampled([0, 0, 0, 0], ["2", "3", "4", None]),
               sampled([0, 0, 0, 1], ["2", "2", "2", "1"]), sampled([0, 0, 0, 0], ["2", None, None, None])]
    removed = verify(given, config, samples).removed
    assert {place: removal.detail for place, removal in removed.items()} == {0: "3 of 4 samples say '2'"}


def test_always_and_never_solved_problems_go_with_their_rates_noted():
    given = items(["always", "never", "sometimes"])
    samples = [sampled(values, [None] * 4) for values in ([1] * 4, [0] * 4, [0, 1, 0, 0])]
    split = difficulty(given, samples, model="m")
    assert {place: removal.why for place, removal in split.removed.items()} == {0: "always_solved", 1: "never_solved"}
    assert split.notes[2] == {"difficulty": {"pass_rate": 0.25, "samples": 4, "model": "m"}}
    assert set(difficulty(given, samples, model="m", keep_never_solved=True).removed) == {0}


def test_a_problem_whose_responses_all_failed_stays_without_a_rate():
    split = difficulty(items(["unknown"]), [sampled([], [])], model="m")
    assert (split.removed, split.notes) == ({}, {})
    assert verify(items(["a"]), load(["reward.routes={math: exact}"]), [sampled([], [])]).removed == {}
