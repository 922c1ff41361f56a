"""A few judged responses of every step, to be read: <run.dir>/samples.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_rl.types import RolloutGroup

__all__ = ["LONGEST_TEXT", "sampled_responses"]

LONGEST_TEXT = 8000
"""Characters of a prompt or response that are kept; of a longer one the middle is left out."""


def sampled_responses(groups: Sequence[RolloutGroup], count: int, *, seed: int, step: int) -> list[dict[str, Any]]:
    """One response each of `count` groups, drawn by (seed, step) alone, with its verdict."""
    rng = np.random.default_rng([seed, step])
    rows = []
    for place in sorted(rng.permutation(len(groups))[:count].tolist()):
        group = groups[place]
        sample = int(rng.integers(len(group.scores)))
        score, rollout = group.scores[sample], group.rollouts[sample]
        rows.append({"id": group.prompt.id, "sample": sample, "prompt": _clipped(group.prompt.text),
                     "response": _clipped(group.texts[sample]), "answer": _clipped(group.prompt.answer),
                     "reward": score.value, "correct": score.correct, "status": score.status, "detail": score.detail,
                     "response_tokens": rollout.response_tokens, "finish": rollout.finish.value})
    return rows


def _clipped(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n... {len(text) - 2 * half:,} characters left out ...\n{text[-half:]}"
