"""Teachers on servers (algo.distillation): each response is scored as it ends, while others are still being sampled.

Each teacher is a fleet of its own, so a request that fails goes to another of its servers and one that keeps failing
rests. The weights of a teacher never change. Letter: L tokens of a sequence.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_rl.config.distillation import DistillationConfig, TeacherConfig
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.connection import EngineHTTPError
from megatron_rl.rollout.fleet import Fleet, Tally
from megatron_rl.types import Rollout

VOCABULARY_BATCH = 8192


class Teachers:
    """`async with Teachers(...) as teachers:` in the event loop of the orchestrator."""

    def __init__(self, config: DistillationConfig, rollout: RolloutConfig):
        self._config, self._tally = config, Tally()
        self.fleets = {name: Fleet(_clients(name, teacher, rollout), rollout)
                       for name, teacher in config.teachers.items() if teacher.urls}
        self._name, self._numbers = f"teacher-{secrets.token_hex(6)}", 0  # several runs may share a server

    async def __aenter__(self) -> Teachers:
        for fleet in self.fleets.values():
            await fleet.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for fleet in self.fleets.values():
            await fleet.close()

    async def check_vocabulary(self, texts: Sequence[str]) -> None:
        """ValueError unless the tokens of every server are those of the student: `texts` by token id."""
        own = vocabulary_hash(texts)
        for name, teacher in self._config.teachers.items():
            for url in teacher.urls:
                key = f"algo.distillation.teachers.{name}.urls: {url}"
                try:
                    theirs = await _texts_of(self.fleets[name].client(url), len(texts))
                except EngineHTTPError as error:
                    # not `from error`: the launcher shows the first traceback of the log, which must be this one
                    raise ValueError(f"{key} cannot be asked for its vocabulary: {error}") from None
                check_same_vocabulary(key, own, vocabulary_hash(theirs))

    async def scored(self, rollout: Rollout, domain: str) -> Rollout:
        """The rollout with the teacher's log-probabilities at every token but the first of each of its sequences.

        Unchanged if the domain has no teacher on a server. FleetError if no server could score it.
        """
        fleet = self.fleets.get(self._config.teacher_of(domain) or "")
        if fleet is None:
            return rollout
        first, *others = await asyncio.gather(*(self._scored(fleet, sequence) for sequence in rollout.sequences))
        return replace(first, others=tuple(others))

    async def _scored(self, fleet: Fleet, sequence: Rollout) -> Rollout:
        self._numbers += 1
        logprobs, ids = await fleet.input_logprobs(sequence.token_ids.tolist(), rid=f"{self._name}-{self._numbers}",
                                                   tally=self._tally, top_k=self._config.top_k)
        return replace(sequence, teacher_logprobs=_behind_the_first(logprobs),
                       teacher_ids=None if ids is None else _behind_the_first(ids))


def _behind_the_first(values: np.ndarray) -> np.ndarray:
    """[L, ...] of [L - 1, ...]: the first token has nothing before it."""
    return np.concatenate([np.zeros((1, *values.shape[1:]), values.dtype), values])


def key_of(name: str, teacher: TeacherConfig) -> str | None:
    """The key of its servers, if they have one. ValueError if the environment lacks it."""
    key = None if teacher.api_key_env is None else os.environ.get(teacher.api_key_env)
    if teacher.api_key_env is not None and key is None:
        raise ValueError(f"algo.distillation.teachers.{name}.api_key_env: the environment variable "
                         f"{teacher.api_key_env} is not set")
    return key


def _clients(name: str, teacher: TeacherConfig, rollout: RolloutConfig) -> list[EngineClient]:
    key = key_of(name, teacher)
    return [EngineClient(url, timeout_s=rollout.request_timeout_s,
                         control_timeout_s=rollout.engine.control_timeout_s, api_key=key) for url in teacher.urls]


async def _texts_of(client: EngineClient, size: int) -> list[str]:
    texts: list[str] = []
    for begin in range(0, size, VOCABULARY_BATCH):
        texts += await client.detokenize([[token] for token in range(begin, min(begin + VOCABULARY_BATCH, size))])
    return texts


def vocabulary_hash(texts: Sequence[str]) -> str:
    """16 hex digits for the texts of all token ids, in order."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def check_same_vocabulary(key: str, own: str, theirs: str) -> None:
    if own != theirs:
        raise ValueError(f"{key} has another vocabulary (hash {theirs}) than model.path ({own}): its log-probabilities "
                         "would be of other tokens; distil from a teacher with the student's tokenizer")
