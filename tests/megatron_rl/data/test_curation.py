"""Curation on made-up sets: what must go goes, what must stay stays, and every row is accounted for."""

import json
import random

import pytest

from megatron_rl.config.data import DataConfig
from megatron_rl.data.curation.clean import clean
from megatron_rl.data.curation.contamination import decontaminate
from megatron_rl.data.curation.duplicates import dedup
from megatron_rl.data.curation.items import Removal, Split, read_items, words, write_split
from megatron_rl.data.problems import Problem
from tests.megatron_rl.data.curation_sets import GOOD, UNUSABLE, disguised, items, rates, reworded, stories


def test_every_unusable_problem_goes_for_its_own_reason_and_no_other_goes():
    texts = [*GOOD, *(problem for problems in UNUSABLE.values() for problem in problems)]
    expected = {place: why for place, why in enumerate(
        [None] * len(GOOD) + [why for why, problems in UNUSABLE.items() for _ in problems]) if why}
    removed = clean(items(texts)).removed
    recall, precision = rates(set(removed), set(expected))
    print(f"clean: recall {recall:.3f}, precision {precision:.3f} of {len(expected)} in {len(texts)}")
    assert {place: removal.why for place, removal in removed.items()} == expected, [
        (texts[place], removed.get(place)) for place in expected.keys() ^ removed.keys()]


@pytest.fixture(scope="module")
def duplicated():
    """(items, places of exact duplicates, places of near ones): each after the problem that it repeats."""
    rng = random.Random(1)
    texts = stories(300, seed=2)
    labelled = [(text, None) for text in texts]
    labelled += [(disguised(text, rng), "exact_duplicate") for text in texts[:40]]
    labelled += [(reworded(text, rng), "near_duplicate") for text in texts[40:100]]
    return items([text for text, _ in labelled]), {place: why for place, (_, why) in enumerate(labelled) if why}


def test_duplicates_are_found_and_problems_that_differ_in_a_number_stay(duplicated):
    given, expected = duplicated
    removed = dedup(given).removed
    for why in ("exact_duplicate", "near_duplicate"):
        wanted = {place for place, reason in expected.items() if reason == why}
        recall, precision = rates({place for place, removal in removed.items() if removal.why == why}, wanted)
        print(f"dedup, {why}: recall {recall:.3f}, precision {precision:.3f} of {len(wanted)} in {len(given)}")
        assert recall >= 0.95 and precision >= 0.99
    place = next(place for place, removal in removed.items() if removal.why == "near_duplicate")
    assert f"of {given[place - 300].problem.id} " in removed[place].detail and "similarity 0." in removed[place].detail


def test_without_the_rule_on_numbers_templates_collapse(duplicated):
    given, _ = duplicated
    assert len(dedup(given, same_numbers=False).removed) > len(dedup(given).removed) + 30


def test_duplicates_with_other_answers_say_so():
    given = items([("How many primes are below ten?", "4"), ("how many primes are below ten", "5")])
    assert "answers differ: '4' there, '5' here" in dedup(given).removed[1].detail


def test_leaks_are_found_and_alike_problems_stay():
    rng = random.Random(3)
    texts = stories(400, seed=4)
    benchmark = [Problem(f"bench:{i}", text, "1", "math") for i, text in enumerate([*texts[:50], "Compute 17*23 - 4."])]
    embedded = [f"This is from a contest years ago. {text} Write the result in a box." for text in texts[:20]]
    leaks = [*texts[20:30], *(disguised(text, rng) for text in texts[30:40]), *embedded,
             *(reworded(text, rng) for text in texts[40:50]), "Please compute 17*23 - 4."]
    given = items([*texts[50:], *leaks])
    wanted = set(range(len(texts) - 50, len(given)))
    split = decontaminate(given, benchmark, ngram=10)
    recall, precision = rates(set(split.removed), wanted)
    print(f"decontaminate: recall {recall:.3f}, precision {precision:.3f} of {len(wanted)} in {len(given)}")
    assert recall >= 0.95 and precision >= 0.99
    assert split.removed[len(given) - 1] == Removal("contaminated", "1.00 of bench:50")


def test_layout_of_latex_does_not_hide_a_repetition():
    spelled = words("Let $\\left( x \\right) = \\dfrac{1}{2}$, find $x$.")
    assert spelled == words("let (x)=\\frac{1}{2}  Find x") == ["let", "x", "=", "frac", "1", "2", "find", "x"]
    assert words("A\u00a0B \uff11") == ["a", "b", "1"]
    assert words("\u6c42x\u7684\u503c") == ["\u6c42", "x", "\u7684", "\u503c"]  # Chinese has no spaces


def test_every_row_is_written_once_as_it_was_read(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [{"prompt": f"{i}+1", "answer": str(i + 1), "source": "made up"} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    with pytest.raises(ValueError, match="in.jsonl:5: not JSON"):
        read_items(DataConfig(path=str(path)))
    given, bad = read_items(DataConfig(path=str(path), on_error="skip"))
    counts = write_split(tmp_path / "out", Split(given, {1: Removal("odd", "because")}, {0: {"note": 7}}), bad)
    kept, removed = ([json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
                     for name in ("kept.jsonl", "removed.jsonl"))
    assert kept == [{**rows[0], "note": 7}, rows[2], rows[3]]
    assert removed[1] == {**rows[1], "removed": {"why": "odd", "detail": "because", "from": f"{path}:2"}}
    assert removed[0]["removed"]["why"] == "bad_row" and removed[0]["removed"]["from"] == f"{path}:5"
    assert counts == json.loads((tmp_path / "out" / "report.json").read_text())
    assert counts == {"read": 5, "kept": 3, "odd": 1, "bad_row": 1}
