"""The data types that flow through one step; no logic.

Letters: P prompts, K responses per prompt, N = P*K, L tokens of one sequence, T tokens of a packed
micro-batch, S sequences in it. Per-token arrays describe the token at the same index; the one shift
(token t is predicted from position t-1) happens in batch/pack.py.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a worker that judges responses holds these types, and no torch
    import torch

    from c3po import SumCount

__all__ = [
    "Finish", "PackedMicrobatch", "Prompt", "Rollout", "RolloutGroup", "Score", "StepResult", "TrainSample",
    "VersionSpan",
]


@dataclass(frozen=True)
class Prompt:
    """One problem: what the model reads and how its answer is judged."""

    id: str
    token_ids: tuple[int, ...]
    text: str
    answer: str
    domain: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Finish(enum.Enum):
    """Why generation ended: a stop token, the length limit, an abort, or a failure of the engine or environment."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class VersionSpan:
    """Response tokens [start, end) were sampled by the weights of `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Rollout:
    """One sampled sequence, prompt and response, as the engine's token ids (never re-tokenised).

    token_ids int32 [L]; trainable bool [L], True at sampled tokens; rollout_logprobs fp32 [L], the
    engine's log-probability of each sampled token, 0 elsewhere; routed_experts uint8 [L-1, M, topk] | None.
    teacher_logprobs fp32 [L] | None, a teacher's log-probability of each token but the first (rollout/teachers.py).
    With algo.distillation.top_k it is [L, k], of the teacher's k most probable tokens there, teacher_ids int32 [L, k].
    others: further sequences of the same response, an agent's other conversations. They share its reward. No sampled
    token is trainable in two of them.
    """

    token_ids: np.ndarray
    trainable: np.ndarray
    rollout_logprobs: np.ndarray
    finish: Finish
    weight_versions: tuple[VersionSpan, ...]
    routed_experts: np.ndarray | None = None
    teacher_logprobs: np.ndarray | None = None
    teacher_ids: np.ndarray | None = None
    others: tuple[Rollout, ...] = ()

    @property
    def sequences(self) -> tuple[Rollout, ...]:
        """This one, then the others."""
        return (self, *self.others)

    @property
    def response_tokens(self) -> int:
        """Sampled tokens of all sequences, which may carry loss."""
        return sum(int(sequence.trainable.sum()) for sequence in self.sequences)

    @property
    def tokens_after_prompt(self) -> int:
        """Sampled tokens of this sequence and those that were given: what rollout.max_response_tokens limits."""
        first_sampled = int(self.trainable.argmax()) if self.trainable.any() else len(self.token_ids)
        return len(self.token_ids) - first_sampled


FAILURES = ("error", "engine_error", "environment_error")
"""Statuses of a response that nobody could judge, get from an engine, or answer in the middle."""


@dataclass(frozen=True)
class Score:
    """A judged response: what it is worth, and whether it is right. These are two things.

    - value: the reward before any shaping, on any scale.
    - status: correct | wrong | no_answer | timeout | graded, one of programs (reward/base.py), or one of FAILURES.
    - correct: follows from the status: True for `correct`, False for all others except `graded`. A graded response is
      neither right nor plainly wrong. It has correct=False if full marks exist, and None if nobody can say.

    A failed response has no verdict: nothing trains on it, and it does not enter its group's advantages.
    ValueError if status and correct contradict each other.
    """

    value: float
    status: str
    detail: str = ""
    correct: bool | None = None

    def __post_init__(self):
        if self.correct is None and self.status != "graded":
            object.__setattr__(self, "correct", self.status == "correct")
        if self.correct is not None and self.correct != (self.status == "correct"):
            raise ValueError(f"Score(status={self.status!r}, correct={self.correct}): a response is correct if its "
                             "status is 'correct', and only then")

    @property
    def failed(self) -> bool:
        return self.status in FAILURES


@dataclass(frozen=True)
class RolloutGroup:
    """The K responses to one prompt, their texts and (once judged) their scores, in sample order."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...]
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class TrainSample:
    """One sequence as the trainer sees it after the budget cut. Arrays as in Rollout, [L].

    loss_mask marks the kept response tokens; num_response_tokens is |y_i| before the cut (GRPO, Eq. 1), over all
    sequences of the response; advantage is the response's group-relative advantage; index is the response's place in
    the step's N responses; routed_experts uint8 [L-1, M, topk] | None; sentences int32 [L] | None, the number of the
    sentence that a kept token belongs to, from 0 (batch/sentences.py); teacher the place of its teacher among
    algo.distillation.teachers, or -1; teacher_logprobs and teacher_ids as in Rollout, what a teacher on a server said.
    """

    index: int
    token_ids: np.ndarray
    loss_mask: np.ndarray
    rollout_logprobs: np.ndarray
    advantage: float
    num_response_tokens: int
    routed_experts: np.ndarray | None = None
    sentences: np.ndarray | None = None
    teacher: int = -1
    teacher_logprobs: np.ndarray | None = None
    teacher_ids: np.ndarray | None = None


@dataclass
class PackedMicrobatch:
    """Sequences laid end to end (thd), shifted once: position t predicts labels[t]. One context-parallel rank's part.

    Every per-token array describes labels[t], except routed_experts.

    - input_ids, labels, position_ids: int64 [T].
    - second_labels: int64 [T], the token after labels[t] in its sequence. second_mask: bool [T], whether there is one
      and it carries loss.
    - spans [S]: positions of each sequence over all context-parallel ranks; alignment padding, if any, is one more
      sequence. cu_seqlens int32 [S+1]: their bounds.
    - loss_mask: bool [T]. real: bool [T], False on padding.
    - source: int64 [T], the place of the position among the samples' positions laid end to end, -1 on padding
      (batch/pack.py).
    - advantages, rollout_logprobs, response_lengths: fp32 [T].
    - old_logprobs, ref_logprobs: fp32 [T] | None; the no-gradient passes fill them.
    - routed_experts: uint8 [T, M, k] | None, the experts that position t takes in each MoE layer. They come from the
      rollout, or from a no-gradient pass, which records this rank's layers and rows (int16 for more than 256 experts).
    - sentence_ids: int64 [T] | None, TrainSample.sentences counted on over the sequences; 0 where loss_mask is False.
    - teachers: int64 [T], TrainSample.teacher; -1 on padding too. teacher_logprobs: fp32 [T], NaN where nobody has said
      any; no-gradient passes fill those of teachers that the ranks hold. With algo.distillation.top_k it is [T, k], of
      the tokens teacher_ids int64 [T, k].
    - sample_indices, sample_lengths: TrainSample.index and number of positions of each sample.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    spans: tuple[int, ...]
    cu_seqlens: torch.Tensor
    loss_mask: torch.Tensor
    real: torch.Tensor
    source: torch.Tensor
    advantages: torch.Tensor
    rollout_logprobs: torch.Tensor
    response_lengths: torch.Tensor
    sample_indices: tuple[int, ...]
    sample_lengths: tuple[int, ...]
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    routed_experts: torch.Tensor | None = None
    sentence_ids: torch.Tensor | None = None
    teachers: torch.Tensor | None = None
    teacher_logprobs: torch.Tensor | None = None
    second_labels: torch.Tensor | None = None
    second_mask: torch.Tensor | None = None
    teacher_ids: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.numel())

    @property
    def max_seqlen(self) -> int:
        return max(self.spans)


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step reports: reduced (sum, count) metrics and plain gauges."""

    sums: Mapping[str, SumCount]
    gauges: Mapping[str, float]
    skipped: bool = False
