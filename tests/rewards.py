"""Rewards for tests that need groups of known kinds from an untrained model; reached by their dotted paths."""

import os
import time
import zlib
from pathlib import Path

from megatron_rl.types import Prompt, Score


def brevity(prompt: Prompt, response_text: str) -> float:
    """1 for a response of fewer than 40 characters."""
    return float(len(response_text) < 40)


def held_brevity(prompt: Prompt, response_text: str) -> float:
    """brevity; in the run whose folder HELD_RUN names, not before the file `allowed` there allows another step."""
    if "HELD_RUN" in os.environ:
        metrics, allowed = (Path(os.environ["HELD_RUN"], name) for name in ("metrics.jsonl", "allowed"))
        while metrics.exists() and metrics.read_text().count("\n") >= int(allowed.read_text()):
            time.sleep(0.05)
    return brevity(prompt, response_text)


def as_marked(prompt: Prompt, response_text: str) -> float:
    """1, 0 or by the response's checksum, as the problem's column `solved` says: always, never, sometimes."""
    sometimes = float(zlib.crc32(response_text.encode()) % 2)
    return {"always": 1.0, "never": 0.0, "sometimes": sometimes}[prompt.metadata["solved"]]


def learnt_after_two_steps(prompt: Prompt, response_text: str) -> Score:
    """Right or wrong by the response's checksum; right without exception once the run of LEARNT_RUN has two steps."""
    metrics = Path(os.environ["LEARNT_RUN"], "metrics.jsonl")
    learnt = metrics.exists() and metrics.read_text().count("\n") >= 2
    right = learnt or zlib.crc32(response_text.encode()) % 2 == 1
    return Score(float(right), "correct" if right else "wrong")


def raises(prompt: Prompt, response_text: str) -> float:
    raise LookupError("no such column")


def in_words(prompt: Prompt, response_text: str) -> str:
    return "right"
