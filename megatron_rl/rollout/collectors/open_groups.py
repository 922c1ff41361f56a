"""Groups that are under way across steps, and how they are kept in a checkpoint: plain values and numpy arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_rl.rollout.responses import Judged, Ticket
from megatron_rl.rollout.slices import Slices
from megatron_rl.rollout.transcript import Transcript
from megatron_rl.types import Finish, Prompt, Score, VersionSpan


@dataclasses.dataclass
class OpenResponse:
    """One response of an open group; judged once its transcript has finished, or once its agent has ended.

    slices: of an agent under way, whose session holds the tokens; None: it has not begun, or there are no agents.
    """

    ticket: Ticket
    transcript: Transcript = dataclasses.field(default_factory=Transcript)
    judged: Judged | None = None
    slices: Slices | None = None

    @property
    def tokens(self) -> int:
        """How many were sampled and may still be trained on."""
        if self.judged is not None:
            return self.judged.rollout.response_tokens
        return self.transcript.sampled_tokens if self.slices is None else self.slices.sampled


@dataclasses.dataclass
class OpenGroup:
    """A prompt with at least one unfinished response. step: when its first request went out."""

    prompt: Prompt
    step: int
    responses: list[OpenResponse]

    @property
    def tokens(self) -> int:
        return sum(response.tokens for response in self.responses)

    @property
    def finished(self) -> bool:
        return all(response.judged is not None for response in self.responses)

    @property
    def failed(self) -> bool:
        return all(response.judged is not None and response.judged.score.failed for response in self.responses)


def prompt_to_state(prompt: Prompt) -> dict[str, Any]:
    return {**dataclasses.asdict(prompt), "token_ids": list(prompt.token_ids)}


def prompt_from_state(state: dict[str, Any]) -> Prompt:
    return Prompt(**{**state, "token_ids": tuple(state["token_ids"])})


def group_to_state(group: OpenGroup) -> dict[str, Any]:
    return {"prompt": prompt_to_state(group.prompt), "step": group.step,
            "responses": [_response_to_state(response) for response in group.responses]}


def group_from_state(state: dict[str, Any]) -> OpenGroup:
    prompt = prompt_from_state(state["prompt"])
    return OpenGroup(prompt, state["step"], [_response_from_state(each, prompt) for each in state["responses"]])


def _response_to_state(response: OpenResponse) -> dict[str, Any]:
    transcript, judged = response.transcript, response.judged
    return {
        "ticket": [response.ticket.tag, response.ticket.step, response.ticket.index, response.ticket.sample],
        "token_ids": transcript.token_ids,
        "sampled": transcript.sampled,
        "logprobs": transcript.logprobs,
        "weight_versions": [[span.version, span.start, span.end] for span in transcript.weight_versions],
        "routed_experts": transcript.routed_experts,
        "finish": None if transcript.finish is None else transcript.finish.value,
        "judged": None if judged is None else {
            "text": judged.text, "score": dataclasses.asdict(judged.score), "taught": judged.rollout.teacher_logprobs,
            "taught_ids": judged.rollout.teacher_ids},
    }


def _response_from_state(state: dict[str, Any], prompt: Prompt) -> OpenResponse:
    transcript = Transcript(
        state["token_ids"], state["sampled"], state["logprobs"],
        tuple(VersionSpan(*span) for span in state["weight_versions"]),
        None if state["finish"] is None else Finish(state["finish"]), state["routed_experts"])
    judged = None
    if state["judged"] is not None:
        rollout = dataclasses.replace(transcript.rollout(prompt), teacher_logprobs=state["judged"]["taught"],
                                      teacher_ids=state["judged"].get("taught_ids"))
        judged = Judged(rollout, state["judged"]["text"], Score(**state["judged"]["score"]))
    return OpenResponse(Ticket(prompt, *state["ticket"]), transcript, judged)
