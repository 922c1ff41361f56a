"""The tokens after a prompt while they grow: parts that were sampled, and parts that were given (a tool's answer).

Letters: R tokens after the prompt. Nothing is ever re-tokenised. Parts are token ids from the engine or from the
environment, joined end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_rl.rollout.sampling import GenerateResult
from megatron_rl.types import Finish, Prompt, Rollout, VersionSpan


def _empty(dtype: type) -> Any:
    return field(default_factory=lambda: np.zeros(0, dtype=dtype))


@dataclass(frozen=True)
class Transcript:
    """The tokens after a prompt so far. finish None: it goes on.

    token_ids int32 [R]; sampled bool [R], False at given tokens; logprobs fp32 [R], 0 at given tokens. The spans
    of weight_versions cover the sampled tokens, in order; a continued part adds its own.
    """

    token_ids: np.ndarray = _empty(np.int32)
    sampled: np.ndarray = _empty(np.bool_)
    logprobs: np.ndarray = _empty(np.float32)
    weight_versions: tuple[VersionSpan, ...] = ()
    finish: Finish | None = None
    routed_experts: np.ndarray | None = None

    @property
    def sampled_tokens(self) -> int:
        return int(self.sampled.sum())

    def extended(self, result: GenerateResult, *, finish: Finish | None) -> Transcript:
        """The transcript with what the engine sampled next."""
        begin, count = len(self.token_ids), len(result.output_ids)
        assert not count or result.weight_versions[-1].end == count, (result.weight_versions, count)
        return Transcript(
            token_ids=np.concatenate([self.token_ids, result.output_ids]),
            sampled=np.concatenate([self.sampled, np.ones(count, dtype=np.bool_)]),
            logprobs=np.concatenate([self.logprobs, result.logprobs]),
            weight_versions=joined(self.weight_versions, tuple(
                VersionSpan(span.version, begin + span.start, begin + span.end) for span in result.weight_versions)),
            finish=finish,
            routed_experts=grown(self.routed_experts, result.routed_experts),
        )

    def given(self, token_ids: Sequence[int]) -> Transcript:
        """The transcript with tokens that nobody sampled. They are context and never trained on."""
        count = len(token_ids)
        return replace(
            self,
            token_ids=np.concatenate([self.token_ids, np.asarray(token_ids, dtype=np.int32)]),
            sampled=np.concatenate([self.sampled, np.zeros(count, dtype=np.bool_)]),
            logprobs=np.concatenate([self.logprobs, np.zeros(count, dtype=np.float32)]),
        )

    def rollout(self, prompt: Prompt) -> Rollout:
        """Prompt and response as one sequence; log-probabilities are 0 on the prompt."""
        assert self.finish is not None, "the response goes on"
        assert self.sampled_tokens or self.finish is Finish.ERROR, "a finished response has at least one sampled token"
        length = len(prompt.token_ids)
        return Rollout(
            token_ids=np.concatenate([np.asarray(prompt.token_ids, dtype=np.int32), self.token_ids]),
            trainable=np.concatenate([np.zeros(length, dtype=np.bool_), self.sampled]),
            rollout_logprobs=np.concatenate([np.zeros(length, dtype=np.float32), self.logprobs]),
            finish=self.finish,
            weight_versions=self.weight_versions,
            routed_experts=self.routed_experts,
        )


def joined(first: tuple[VersionSpan, ...], second: tuple[VersionSpan, ...]) -> tuple[VersionSpan, ...]:
    """Neighbouring spans of one version become one."""
    if first and second and first[-1].version == second[0].version and first[-1].end == second[0].start:
        middle = VersionSpan(first[-1].version, first[-1].start, second[0].end)
        return (*first[:-1], middle, *second[1:])
    return first + second


def grown(known: np.ndarray | None, whole: np.ndarray | None) -> np.ndarray | None:
    """The known rows, and the new ones of `whole`."""
    return whole if known is None or whole is None else np.concatenate([known, whole[len(known):]])
