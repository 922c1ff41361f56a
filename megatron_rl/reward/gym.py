"""Problems of reasoning-gym (0.1.25), judged by the checker of their own task."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import pickle
from typing import Any

from megatron_rl.reward.base import Job, run, verdict
from megatron_rl.reward.boxed import answer_part, last_boxed
from megatron_rl.reward.gym_answers import OWN, fits, is_reference
from megatron_rl.types import Prompt, Score

__all__ = ["ReasoningGymScorer", "judge_gym"]

class ReasoningGymScorer:
    """1 if the answer is the reference, or if the task's checker gives full marks to an answer of the task's shape.

    reward/gym_answers.py says which shapes those are. Part marks count as wrong. The answer is the last \\boxed{...},
    or the whole stripped text without a box; thinking does not count. The prompt's metadata carries {"task",
    "task_config", "entry"} (data.source=reasoning_gym).
    """

    preload = ("reasoning_gym",)

    @staticmethod
    def warm_up() -> None:
        importlib.import_module("reasoning_gym")

    def check(self, prompt: Prompt) -> None:
        missing = [name for name in ("task", "task_config", "entry") if name not in prompt.metadata]
        if missing:
            raise ValueError(f"prompt {prompt.id} has no metadata {missing}: reward.routes.{prompt.domain}="
                             "reasoning_gym judges prompts of data.source=reasoning_gym only")

    def prepare(self, prompt: Prompt, response_text: str) -> Score | Job:
        self.check(prompt)
        text = answer_part(response_text, prompt.text)
        answer = last_boxed(text)
        if answer is None:
            answer = text.strip()
        if not answer:
            return Score(0.0, "no_answer")
        config = json.dumps(prompt.metadata["task_config"], sort_keys=True)
        args = prompt.metadata["task"], config, answer, prompt.metadata["entry"]
        return Job(judge_gym, args, hashlib.blake2b(pickle.dumps(args)).digest())

    def score(self, prompt: Prompt, response_text: str) -> Score:
        return run(self.prepare(prompt, response_text))


def judge_gym(task: str, config_json: str, answer: str, entry: dict[str, Any]) -> Score:
    """Whether `answer` is right. An exception of the task's checker becomes status `error`."""
    if entry["answer"] is not None and is_reference(task, answer, entry["answer"]):
        return verdict(True)
    if task in OWN:
        return verdict(OWN[task](answer, entry))
    return verdict(fits(task, answer, entry) and _dataset(task, config_json).score_answer(answer, entry) == 1.0)


@functools.lru_cache(maxsize=128)
def _dataset(task: str, config_json: str) -> Any:
    import reasoning_gym  # here, because only workers need it

    return reasoning_gym.create_dataset(task, size=1, seed=0, **json.loads(config_json))
