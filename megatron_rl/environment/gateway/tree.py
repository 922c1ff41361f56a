"""A session's conversations: a tree of immutable turns.

A turn holds what was given to the model after its parent's tokens (rendered messages) and what the model sampled
next. Tokens from the root to a turn are exactly what the engine read and sampled; nothing is tokenised again.
A retry is a sibling. A history that begins anew, or that we did not sample, is another root.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from megatron_rl.environment.gateway.messages import Message, call_ids
from megatron_rl.rollout.sampling import GenerateResult
from megatron_rl.rollout.transcript import Transcript
from megatron_rl.types import Finish


@dataclass(frozen=True, eq=False)
class Turn:
    """One request and what was sampled for it.

    given: token ids that were rendered after the parent's tokens.
    result: what the engine sampled, without routed experts.
    experts: uint8 [rows, M, topk], those of the tokens that the parent's path has none of; None if not asked for.
    answer: the message that the agent got. history: the digest of all messages up to it.
    end: the end token that was sampled last, as text, or empty.
    """

    parent: Turn | None
    given: tuple[int, ...]
    result: GenerateResult
    experts: np.ndarray | None
    answer: Message
    history: bytes
    end: str

    @classmethod
    def after(cls, parent: Turn | None, given: tuple[int, ...], result: GenerateResult, *, answer: Message,
              history: bytes, end: str) -> Turn:
        """result: as the engine gave it, with the experts of the whole sequence if they were asked for."""
        known = 0 if parent is None else parent.tokens - 1  # no layer has read the last token
        experts = None if result.routed_experts is None else result.routed_experts[known:].copy()
        return cls(parent, given, replace(result, routed_experts=None), experts, answer, history, end)

    @cached_property
    def tokens(self) -> int:
        """How many lie on the path from the root to here."""
        return (0 if self.parent is None else self.parent.tokens) + len(self.given) + len(self.result.output_ids)

    def path(self) -> list[Turn]:
        """From the root to this turn."""
        turns, turn = [], self
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]

    def token_ids(self) -> list[int]:
        return [token for turn in self.path() for token in (*turn.given, *turn.result.output_ids.tolist())]

    def transcript(self, finish: Finish | None = None,
                   known: Container[Turn] = ()) -> tuple[tuple[int, ...], Transcript]:
        """(the root's prompt, everything after it), as the responses without an agent have them.

        known: turns that are trained in another sequence; here they are context.
        """
        path = self.path()
        transcript = Transcript()
        for place, turn in enumerate(path):
            transcript = transcript.given(turn.given) if place else transcript
            transcript = (transcript.given(turn.result.output_ids.tolist()) if turn in known
                          else transcript.extended(turn.result, finish=None))
        experts = None if self.experts is None else np.concatenate([turn.experts for turn in path])
        return path[0].given, replace(transcript, finish=finish or self.result.finish, routed_experts=experts)


@dataclass
class Tree:
    """turns: in the order in which they were answered.

    misses: requests that began anew although their history holds answers, which are not ours or were changed.
    """

    turns: list[Turn] = field(default_factory=list)
    misses: int = 0
    _by_history: dict[bytes, list[Turn]] = field(default_factory=dict)

    def add(self, turn: Turn) -> None:
        self.turns.append(turn)
        self._by_history.setdefault(turn.history, []).append(turn)

    def others(self) -> list[tuple[tuple[int, ...], Transcript]]:
        """Prompt and rest of what the path to the last turn leaves out: a sequence for each other end of a path.

        A turn that several paths share is trained in the first of them.
        """
        known = set(self.turns[-1].path())
        inner = {turn.parent for turn in self.turns}
        sequences = []
        for end in self.turns[:-1]:
            if end not in inner:
                sequences.append(end.transcript(known=frozenset(known)))
                known.update(end.path())
        return sequences

    def deepest(self, digests: Sequence[bytes], messages: Sequence[Message]) -> tuple[Turn | None, int]:
        """(the last turn of the longest history that is ours, how many messages that is).

        If several turns said the same, it takes the one whose ids of calls were sent back, else the latest.
        """
        for place in range(len(messages) - 1, -1, -1):
            same = self._by_history.get(digests[place]) if messages[place]["role"] == "assistant" else None
            if same:
                ids = call_ids(messages[place])
                named = [turn for turn in same if call_ids(turn.answer) == ids]
                return (named or same)[-1], place + 1
        return None, 0
