"""Sampled responses: drawn by (seed, step) alone, whole or visibly clipped, each step once after a resume."""

from megatron_rl.config.schema import ObserveConfig
from megatron_rl.observe.jsonl import read_jsonl
from megatron_rl.observe.samples import LONGEST_TEXT, sampled_responses
from megatron_rl.observe.sinks import MetricsLog
from tests.megatron_rl.observe.test_verdicts import SCALES, groups_of
from tests.megatron_rl.test_recipes import GROUPS, group


def test_a_sample_says_what_was_asked_answered_and_judged():
    (row,) = sampled_responses([GROUPS[0]], 1, seed=0, step=0)
    texts, scores = GROUPS[0].texts, GROUPS[0].scores
    assert row["response"] == texts[row["sample"]] and row["status"] == scores[row["sample"]].status
    assert (row["prompt"], row["answer"], row["id"]) == ("q", "7", "a")
    assert row["correct"] == (row["status"] == "correct") and row["reward"] == float(row["correct"])


def test_the_draw_is_of_seed_and_step_and_takes_each_group_once():
    groups = groups_of(SCALES["0 and 1"])
    def drawn(**where):
        return [(row["sample"], row["response_tokens"]) for row in sampled_responses(groups, 3, **where)]

    assert drawn(seed=1, step=2) == drawn(seed=1, step=2) and len(drawn(seed=1, step=2)) == 3
    assert len({tuple(drawn(seed=1, step=step)) for step in range(8)}) > 1
    assert len({tuple(drawn(seed=seed, step=1)) for seed in range(8)}) > 1
    assert [len(sampled_responses(groups, count, seed=0, step=0)) for count in (99, 0)] == [4, 0]


def test_every_response_of_a_group_has_the_same_chance():
    counts = [0, 0, 0]
    for step in range(600):
        counts[sampled_responses([GROUPS[0]], 1, seed=0, step=step)[0]["sample"]] += 1
    assert min(counts) > 150, "each is expected 200 times, give or take 12"


def test_a_long_text_loses_its_middle_and_says_how_much():
    (row,) = sampled_responses([group(("a" * 9000 + "end", 1.0, 2))], 1, seed=0, step=0)
    assert row["response"].endswith("end") and "1,003 characters left out" in row["response"]
    assert len(row["response"]) < LONGEST_TEXT + 60


def test_a_resume_leaves_no_sample_of_a_later_step(tmp_path):
    for first, last, resume in ((1, 5, None), (4, 6, 3)):
        with MetricsLog(tmp_path, ObserveConfig(wandb="off"), {}, resume_step=resume) as log:
            for step in range(first, last + 1):
                log.log_samples(step, [{"response": str(step)}, {"response": "b"}])
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
