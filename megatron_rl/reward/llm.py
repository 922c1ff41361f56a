"""A language model as a judge: one request to an OpenAI-compatible server for each response, under a rubric.

What is asked for is a JSON object with a score from 0 to 1, in the judge's answer. An answer without one, or one that
reward.judge.max_tokens cut, is asked for again, as a failed request is; after the retries the response has no verdict
(`error`), and nothing trains on it.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.reward import JudgeConfig
from megatron_rl.foreign import LONGEST_MESSAGE, as_utf8
from megatron_rl.reward.base import Job, Judgement, run
from megatron_rl.reward.requests import FAILURES, attempts, failure_of
from megatron_rl.types import Prompt, Score

__all__ = ["JudgeScorer", "ask_judge", "read_verdict"]

PLACES = ("{question}", "{reference}", "{response}")
FORM = 'Answer with one JSON object and nothing else: {"why": "<one sentence>", "score": <a number from 0 to 1>}'
CLOCK_FACTOR = 3
"""A job's clock time is this many times its limit, which is processor time (reward/pool.py)."""


class JudgeScorer:
    """reward.routes.<domain>=llm_judge. A judgement is remembered by its content: equal requests are sent once.

    ValueError if the rubric or the key is not there.
    """

    preload = ("megatron_rl.reward.llm",)

    def __init__(self, config: JudgeConfig):
        if config.url is None or config.rubric is None:
            raise ValueError("llm_judge needs reward.judge.url, such as http://judge:8000/v1, and reward.judge.rubric, "
                             "a file that says what a good response is")
        try:
            self._rubric = Path(config.rubric).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"reward.judge.rubric={config.rubric}: {error}") from error
        if PLACES[2] not in self._rubric:
            raise ValueError(f"reward.judge.rubric={config.rubric} has no place for the response: write "
                             f"{', '.join(PLACES)} where they belong")
        self._config, self._key = config, _key(config)

    @staticmethod
    def warm_up() -> None:
        """Nothing to import: a worker only waits for the judge."""

    def prepare(self, prompt: Prompt, response_text: str) -> Score | Job:
        if not response_text.strip():
            return Score(0.0, "no_answer")
        said = dict(zip(PLACES, (prompt.text, prompt.answer, response_text), strict=True))
        text = re.sub("|".join(map(re.escape, PLACES)), lambda place: said[place[0]], self._rubric)
        body = json.dumps({"model": self._config.model, "max_tokens": self._config.max_tokens, "temperature": 0,
                           "messages": [{"role": "user", "content": f"{text.rstrip()}\n\n{FORM}"}]})
        content = hashlib.sha256(f"{self._config.url}\n{body}".encode()).digest()
        return Job(ask_judge, (self._config, body, self._key), memo_key=content,
                   timeout_s=self._config.longest_s / CLOCK_FACTOR, overdue="error")  # late is the judge

    def check(self, prompt: Prompt) -> None:
        """Checks nothing: a rubric may do without a reference."""

    def score(self, prompt: Prompt, response_text: str) -> Score:
        return run(self.prepare(prompt, response_text))


@dataclass
class _Cost:
    requests: int = 0
    tokens: int = 0


def ask_judge(config: JudgeConfig, body: str, key: Mapping[str, str]) -> Score:
    """The judge's verdict; `error` if there is none after the retries. What was asked and read counts either way.

    key: the header that holds it.
    """
    cost, failure = _Cost(), ""
    for _ in attempts(config.retries):
        cost.requests += 1
        deadline = time.monotonic() + config.timeout_s
        request = urllib.request.Request(f"{config.url.rstrip('/')}/chat/completions", body.encode(),
                                         {"Content-Type": "application/json", **key})
        try:
            with urllib.request.urlopen(request, timeout=config.timeout_s) as answer:
                text, tokens, is_cut = _said(json.loads(_read(answer, deadline)))
            cost.tokens += tokens
            if is_cut:  # what it quoted so far may hold a score that is not its own
                raise ValueError(f"its answer was cut at reward.judge.max_tokens={config.max_tokens}: {text[:200]!r}")
            value, why = read_verdict(text)
        except FAILURES as error:
            failure, may_pass = failure_of(error)
            if not may_pass:
                break
        else:
            graded = 0.0 < value < config.correct_from
            status = "graded" if graded else "wrong" if value < config.correct_from else "correct"
            return Judgement(value, status, why, False if graded else None, cost.requests, cost.tokens)
    return Judgement(0.0, "error", as_utf8(f"reward.judge.url={config.url} gave no verdict: {failure}")
                     [:LONGEST_MESSAGE], None, cost.requests, cost.tokens)


def read_verdict(text: str) -> tuple[float, str]:
    """(score, why) of the last JSON object in `text` that has a score. ValueError if none has one from 0 to 1.

    Within such an object nothing is looked for: what it quotes is no verdict.
    """
    decoder, found, begin = json.JSONDecoder(), None, text.find("{")
    while begin >= 0:
        end = begin + 1
        try:
            value, behind = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            pass
        else:
            if "score" in value:
                found, end = value, behind
        begin = text.find("{", end)
    score = None if found is None else found["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise ValueError(f"no score from 0 to 1 in the judge's answer: {text[:200]!r}")
    return float(score), as_utf8(str(found.get("why", ""))[:LONGEST_MESSAGE])


def _read(answer: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body. TimeoutError if it is not whole by then: the socket's own limit begins anew with every byte."""
    parts = []
    while part := answer.read1():
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError("its answer was not whole within reward.judge.timeout_s")
    return b"".join(parts)


def _said(answer: Any) -> tuple[str, int, bool]:
    """(text, tokens that were read and written, whether a limit cut it). ValueError if it is no chat completion."""
    try:
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        text, is_cut = choice["message"]["content"], choice.get("finish_reason") == "length"
        tokens = int(usage.get("prompt_tokens") or 0) + int(usage.get("completion_tokens") or 0)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no chat completion: {str(answer)[:200]}") from error
    return text if isinstance(text, str) else "", tokens, is_cut


def _key(config: JudgeConfig) -> Mapping[str, str]:
    """The header; a key in the configuration would be written to every run's folder."""
    if config.key_env is None:
        return {}
    if not os.environ.get(config.key_env):
        raise ValueError(f"reward.judge.key_env={config.key_env}: that environment variable is not set")
    return {"Authorization": f"Bearer {os.environ[config.key_env]}"}
