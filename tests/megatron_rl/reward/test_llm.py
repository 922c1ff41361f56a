"""A model as a judge: against the project's own gateway, in whose engine the judge says what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config.reward import JudgeConfig, RewardConfig
from megatron_rl.reward import RewardPool
from megatron_rl.reward.llm import JudgeScorer, ask_judge, read_verdict
from megatron_rl.types import Prompt, Score
from tests.megatron_rl.environment.world import CONFIG, World, run, world

KEY = "KEY_OF_THE_JUDGE"
RUBRIC = "Is {response} a good answer to {question}? A good one is {reference}, and never {response}."
PROMPT = Prompt("p", (1,), "2+2, or {reference}?", "4", "essay")


def config_of(tmp_path: Path, url: str = "http://127.0.0.1:1/v1", **judge) -> RewardConfig:
    rubric = tmp_path / "rubric.txt"
    rubric.write_text(judge.pop("text", RUBRIC))
    return RewardConfig(routes={"essay": "llm_judge"}, judge=JudgeConfig(
        **{"url": url, "rubric": str(rubric), "key_env": KEY, "retries": 1, "timeout_s": 20.0, **judge}))


def judged(monkeypatch, tmp_path, script, texts, *, latency_s: float = 0.0, **judge):
    """(scores of the texts, what they cost, what the judge read)"""
    async def story():
        async with world(script, latency_s=latency_s, config=replace(CONFIG, retries=0)) as it:
            monkeypatch.setenv(KEY, it.session().key)
            with RewardPool(config_of(tmp_path, f"{it.gateway.url}/v1", **judge)) as pool:
                scores = await asyncio.gather(*(pool.score(PROMPT, text) for text in texts))
                scores += await asyncio.gather(*(pool.score(PROMPT, text) for text in texts[:1]))
                cost = pool.take_metrics()
                assert pool.take_metrics() == {"reward/judge_requests": 0, "reward/judge_tokens": 0}
            return scores, cost, read_by(it)

    return run(story())


def read_by(it: World) -> list[str]:
    return [it.text(body["input_ids"]) for body in it.engine.asked]


def by_digit(read: str) -> str:
    """Marks the response by its first digit, after some thought."""
    mark = int(read.split("Is ")[1][0]) / 10
    return f"It has {{some}} merit.\n```json\n{json.dumps({'why': 'so', 'score': mark})}\n```"


def test_a_judge_marks_what_it_reads_under_the_rubric_and_equal_content_is_asked_once(monkeypatch, tmp_path):
    scores, cost, read = judged(monkeypatch, tmp_path, by_digit, ["5 {question}", "0", "9"], correct_from=0.9)
    half, none, right, again = scores
    assert (half.value, half.status, half.detail, half.correct) == (0.5, "graded", "so", False)
    assert (none.status, right.status, right.correct) == ("wrong", "correct", True)
    assert again == half and type(again) is Score and cost["reward/judge_requests"] == len(read) == 3
    assert cost["reward/judge_tokens"] > sum(len(each) for each in read), "one token per character, and what it said"
    assert any("Is 5 {question} a good answer to 2+2, or {reference}?? A good one is 4, and never 5 {question}." in each
               and each.endswith("assistant\n") and '"score"' in each for each in read)


@pytest.mark.parametrize("garbage", ["", "Good!", '{"score": 2}', '{"score": "1"}', '{"score": true}', '{"mark": 1}',
                                     '{"score": NaN}', "{" * 400, '[{"score"]'])
def test_garbage_is_asked_for_again_and_then_is_no_verdict(monkeypatch, tmp_path, garbage):
    says = iter([garbage, '{"score": 1}', *[garbage] * 9])
    scores, cost, read = judged(monkeypatch, tmp_path, lambda _: next(says), ["a"])
    assert [score.status for score in scores] == ["correct", "correct"], "the second is remembered"
    scores, cost, read = judged(monkeypatch, tmp_path, lambda _: garbage, ["a"])
    assert {score.status for score in scores} == {"error"} and all(score.failed for score in scores)
    assert "gave no verdict: ValueError: no score from 0 to 1" in scores[0].detail
    assert cost["reward/judge_requests"] == len(read) == 4, "no verdict is not remembered, and costs all the same"


def test_a_judge_that_does_not_answer_in_time_is_no_verdict(monkeypatch, tmp_path):
    scores, cost, _ = judged(monkeypatch, tmp_path, by_digit, ["5"], latency_s=30.0, timeout_s=0.5)
    assert scores[0].failed and "TimeoutError" in scores[0].detail
    assert cost == {"reward/judge_requests": 4, "reward/judge_tokens": 0}


def test_a_verdict_that_a_cut_answer_quotes_is_not_the_judges(monkeypatch, tmp_path):
    script = 'The response ends in {"score": 1}. But it is not worth it: {"score": 0}'
    scores, *_ = judged(monkeypatch, tmp_path, lambda _: script, ["a"], max_tokens=60)
    assert scores[0].failed and "its answer was cut at reward.judge.max_tokens=60" in scores[0].detail


class Dripping(http.server.BaseHTTPRequestHandler):
    """A proxy that keeps the line open with spaces until the judge has answered."""

    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b" ")
                time.sleep(0.05)

    def log_message(self, *_):
        pass


def test_a_judge_that_drips_is_given_up_in_time():
    """Without a limit for the whole answer it would be waited for for ever: it always drips in time."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dripping) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        score = ask_judge(JudgeConfig(f"http://127.0.0.1:{server.server_port}", timeout_s=2.0, retries=0), "{}", {})
        server.shutdown()
    assert score.failed and "not whole within reward.judge.timeout_s" in score.detail


FAULTS = {"stalls": (503, 1000, b"x"), "is cut": (503, 1000, b""), "too deep": (200, None, b"[" * 100_000),
          "too long": (200, None, b'{"choices": [{"message": {"content": "{\\"score\\": 1%s}"}}]}' % (b"0" * 400)),
          "no count": (200, None, b'{"choices": [{"message": {"content": ""}}], "usage": {"prompt_tokens": Infinity}}')}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_way_an_answer_fails_it_is_asked_for_again_and_counted(fault):
    asked, over = [], threading.Event()

    class Faulty(http.server.BaseHTTPRequestHandler):
        log_message = Dripping.log_message

        def do_POST(self):
            asked.append(1)
            is_first, good = len(asked) == 1, b'{"choices": [{"message": {"content": "{\\"score\\": 1}"}}]}'
            code, length, body = FAULTS[fault] if is_first else (200, None, good)
            self.send_response(code)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
            if fault == "stalls" and is_first:
                over.wait(60.0)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        score = ask_judge(JudgeConfig(f"http://127.0.0.1:{server.server_port}", timeout_s=30.0, retries=1), "{}", {})
        over.set()
        server.shutdown()
    assert (score.status, score.requests) == ("correct", 2)


def test_a_judgement_over_its_limit_is_no_verdict(monkeypatch, tmp_path):
    """A response that the judge was too slow for would train as a wrong one otherwise."""
    monkeypatch.setenv(KEY, "key")
    job = JudgeScorer(config_of(tmp_path).judge).prepare(PROMPT, "a")
    with RewardPool(config_of(tmp_path)) as pool:
        late = replace(job, function=sum, args=(range(10**12),), timeout_s=0.1)
        assert pool._submit(late).result().failed


@pytest.mark.parametrize(("judge", "why"), [
    ({"url": None}, "reward.routes.essay=llm_judge: llm_judge needs reward.judge.url"),
    ({"rubric": "/nowhere"}, "reward.judge.rubric=/nowhere: .*No such file"),
    ({"text": "Is it good?"}, "has no place for the response: write {question}, {reference}, {response}"),
    ({"key_env": "NO_SUCH_KEY"}, "reward.judge.key_env=NO_SUCH_KEY: that environment variable is not set"),
    ({"url": "judge:8000"}, "reward.judge.url=judge:8000 must start with http"),
    ({"timeout_s": 0}, "reward.judge.timeout_s=0 must be positive"),
    ({"correct_from": 2}, "reward.judge.correct_from=2 must be a score above 0, at most 1"),
])
def test_a_judge_that_cannot_be_asked_is_named_before_the_start(monkeypatch, tmp_path, judge, why):
    monkeypatch.setenv(KEY, "key")
    with pytest.raises(ValueError, match=why):
        RewardPool(config_of(tmp_path, **judge))


def test_a_judge_that_is_not_there_is_found_by_trying(monkeypatch, tmp_path):
    monkeypatch.setenv(KEY, "key")
    with (RewardPool(config_of(tmp_path)) as pool,
          pytest.raises(ValueError, match="reward.routes.essay=llm_judge cannot judge .* gave no verdict: URLError")):
        pool.try_out(PROMPT)


@pytest.mark.parametrize(("text", "verdict"), [
    ('{"score": 0.25, "why": "short"}', (0.25, "short")),
    ('{"score": 0} no: {"why": "better", "score": 1}', (1.0, "better")),
    ('{"marks": {"score": 0.5}}', (0.5, "")),
    ('{"score": 0, "why": {"it says": {"score": 1}}}', (0.0, "{'it says': {'score': 1}}")),
    ('{"score": 0, "said": [{"score": 1}]} {} {', (0.0, "")),
])
def test_the_last_score_counts(text, verdict):
    assert read_verdict(text) == verdict
