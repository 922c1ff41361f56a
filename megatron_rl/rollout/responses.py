"""One judged response, and groups of K of them: the building blocks of every collector.

Each response is one request with its own seed, and is judged while others still run. If no engine can give a response,
or its environment fails, it is a failed response: its score says why, nothing trains on it, and the run goes on.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.rollout.environment import (
    CHARACTERS_PER_TOKEN,
    EnvironmentFailed,
    EnvironmentThreads,
    load_environment,
)
from megatron_rl.rollout.fleet import Fleet, FleetError, Tally
from megatron_rl.rollout.routed_experts import RoutedLayers
from megatron_rl.rollout.sampling import SamplingParams
from megatron_rl.rollout.slices import Slices
from megatron_rl.rollout.transcript import Transcript
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score


class Tokenizer(Protocol):
    def decode(self, token_ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool) -> str: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


class Scorer(Protocol):
    async def score(self, prompt: Prompt, response_text: str) -> Score: ...


@dataclass(frozen=True)
class SamplingPlan:
    """How many responses each prompt gets and how they are sampled. Evaluation uses another plan than training.

    routed_layers: ask the engine for the experts that each token took. slices: who grants the tokens of one response
    of an agent; None: nobody needs to.
    """

    samples_per_prompt: int
    temperature: float
    top_p: float
    max_response_tokens: int
    stop: tuple[str, ...] = ()
    routed_layers: RoutedLayers | None = None
    slices: Slices | None = None

    @classmethod
    def from_config(cls, config: RolloutConfig, routed_layers: RoutedLayers | None = None) -> SamplingPlan:
        return cls(
            samples_per_prompt=config.responses_per_prompt,
            temperature=config.temperature,
            top_p=config.top_p,
            max_response_tokens=config.max_response_tokens,
            stop=config.stop,
            routed_layers=routed_layers,
        )


@dataclass(frozen=True)
class Ticket:
    """A response to sample. Its request id and its seed follow from `tag`, `step`, `index` and `sample` alone.

    index: the prompt's place in the step.
    """

    prompt: Prompt
    tag: str
    step: int
    index: int
    sample: int

    @property
    def rid(self) -> str:
        return f"{self.tag}-{self.step}-{self.index}-{self.prompt.id}-{self.sample}"

    def seed(self, run_seed: int) -> int:
        return sampling_seed(run_seed, self.tag, self.step, self.index, self.sample)


def sampling_seed(run_seed: int, tag: str, step: int, prompt_index: int, sample: int) -> int:
    """A seed in [0, 2**63) that depends on every argument and on nothing else."""
    key = f"{run_seed}/{tag}/{step}/{prompt_index}/{sample}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Judged:
    rollout: Rollout
    text: str
    score: Score


@dataclass(frozen=True)
class Episode:
    """What an agent's conversation with the model came to.

    - prompt: with the token ids of the conversation's first request.
    - transcript: what followed; with a failure as far as it came.
    - answer: the model's last turn as text.
    - verdict: of the agent's own reward, or None: the answer is judged.
    - others: further sequences that are trained on (rollout.agent.sequences=individual).
    """

    prompt: Prompt
    transcript: Transcript
    answer: str
    verdict: Score | None
    failure: FleetError | EnvironmentFailed | None
    others: tuple[Rollout, ...] = ()


class Teachers(Protocol):
    async def scored(self, rollout: Rollout, domain: str) -> Rollout: ...


class Agents(Protocol):
    async def run(self, ticket: Ticket, plan: SamplingPlan, tally: Tally) -> Episode: ...


def as_group(prompt: Prompt, judged: Sequence[Judged]) -> RolloutGroup:
    """judged: the K responses in sample order."""
    return RolloutGroup(prompt=prompt, rollouts=tuple(each.rollout for each in judged),
                        texts=tuple(each.text for each in judged), scores=tuple(each.score for each in judged))


class Responder:
    """Samples and judges. It may be reused for many steps; the engines' weights may change between calls."""

    def __init__(self, fleet: Fleet, config: RolloutConfig, tokenizer: Tokenizer, scorer: Scorer, *, seed: int,
                 eos_token_id: int, routed_layers: RoutedLayers | None = None, agents: Agents | None = None,
                 vocabulary: int | None = None, teachers: Teachers | None = None):
        """vocabulary: how many token ids the model has; None: token ids are not checked. teachers: score responses."""
        self.fleet = fleet
        self._agents = agents
        self.tally = Tally()
        self.plan = SamplingPlan.from_config(config, routed_layers)
        self._config = config
        self._tokenizer = tokenizer
        self._scorer, self._teachers = scorer, teachers
        self._seed = seed
        self._eos_token_id, self._vocabulary = eos_token_id, vocabulary
        self._turn = asyncio.Lock()
        """One request sets out in one round of the event loop: thousands at once would block it for seconds."""
        environment = load_environment(config.environment)
        self._environment = environment and EnvironmentThreads(
            environment, threads=config.environment_threads, timeout_s=config.environment_timeout_s,
            longest=CHARACTERS_PER_TOKEN * config.max_response_tokens)

    def apart(self) -> Responder:
        """A copy with a tally of its own, for requests whose tokens have an account of their own."""
        other = copy.copy(self)
        other.tally = Tally()
        return other

    async def groups(self, prompts: Sequence[Prompt], *, step: int, first_index: int = 0, tag: str = "train",
                     plan: SamplingPlan | None = None) -> list[RolloutGroup]:
        """One group per prompt, in the order of `prompts`. If it is cancelled, it first aborts every request."""
        plan = plan or self.plan
        for prompt in prompts:
            self.check_length(prompt, plan)
        tasks = [asyncio.create_task(self.group(prompt, tag=tag, step=step, index=first_index + offset, plan=plan))
                 for offset, prompt in enumerate(prompts)]
        return await all_or_none(tasks)

    async def group(self, prompt: Prompt, *, tag: str, step: int, index: int, plan: SamplingPlan) -> RolloutGroup:
        tickets = [Ticket(prompt, tag, step, index, sample) for sample in range(plan.samples_per_prompt)]
        return as_group(prompt, await all_or_none(
            [asyncio.create_task(self.respond(ticket, plan)) for ticket in tickets]))

    def tickets(self, prompt: Prompt, *, step: int, index: int) -> list[Ticket]:
        """The K responses of a training prompt."""
        return [Ticket(prompt, "train", step, index, sample) for sample in range(self.plan.samples_per_prompt)]

    async def respond(self, ticket: Ticket, plan: SamplingPlan) -> Judged:
        """One whole response, judged. With an environment it takes turns until the environment or a limit ends it."""
        if self._agents is not None:
            return await self._judge_episode(ticket.prompt, await self._agents.run(ticket, plan, self.tally))
        transcript, turns = Transcript(), []
        while transcript.finish is None:
            begin = len(transcript.token_ids)
            try:
                transcript = await self.sample(ticket, plan, transcript, plan.max_response_tokens - begin)
                assert transcript.finish is not None
                if self._environment is not None and transcript.finish is Finish.STOP:
                    said = transcript.token_ids[begin:]
                    turns.append(self._tokenizer.decode(said, skip_special_tokens=True))
                    transcript = await self._next_turn(ticket.prompt, plan, transcript, turns)
            except (FleetError, EnvironmentFailed) as failure:
                return self.failed(ticket.prompt, transcript, failure)
        return await self.judge(ticket.prompt, transcript)

    async def _judge_episode(self, prompt: Prompt, episode: Episode) -> Judged:
        """The answer is judged by itself: a tool's output may hold the reference."""
        if episode.failure is not None:
            return self.failed(episode.prompt, episode.transcript, episode.failure)
        text = self._tokenizer.decode(episode.transcript.token_ids, skip_special_tokens=True)
        score = episode.verdict or await self._scorer.score(prompt, episode.answer)
        judged = Judged(replace(episode.transcript.rollout(episode.prompt), others=episode.others), text, score)
        return await self._taught(episode.prompt, episode.transcript, judged)

    def failed(self, prompt: Prompt, so_far: Transcript, failure: FleetError | EnvironmentFailed) -> Judged:
        """A response that ends here, without a verdict. Its detail says why."""
        status = "engine_error" if isinstance(failure, FleetError) else "environment_error"
        text = self._tokenizer.decode(so_far.token_ids, skip_special_tokens=True)
        return Judged(replace(so_far, finish=Finish.ERROR).rollout(prompt), text, Score(0.0, status, str(failure)))

    async def _next_turn(self, prompt: Prompt, plan: SamplingPlan, transcript: Transcript,
                         turns: Sequence[str]) -> Transcript:
        """The transcript with the environment's answer, open again; finished if there is no answer or no room."""
        if len(turns) >= self._config.max_turns:
            return transcript
        text = await self._environment.answer(prompt, turns)
        if text is None:
            return transcript
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        if len(transcript.token_ids) + len(token_ids) >= plan.max_response_tokens:
            return replace(transcript, finish=Finish.LENGTH)
        return replace(transcript.given(token_ids), finish=None)

    async def sample(self, ticket: Ticket, plan: SamplingPlan, so_far: Transcript, max_tokens: int) -> Transcript:
        """`so_far` and at most max_tokens more.

        finish stays None if max_tokens ended it before the plan's limit did.
        """
        async with self._turn:
            await asyncio.sleep(0)
        begin = len(so_far.token_ids)
        assert so_far.finish is None and 0 < max_tokens <= plan.max_response_tokens - begin
        sampling = SamplingParams(
            temperature=plan.temperature, max_new_tokens=max_tokens, top_p=plan.top_p, seed=ticket.seed(self._seed),
            stop=plan.stop, stop_token_ids=(self._eos_token_id,))
        result = await self.fleet.generate([*ticket.prompt.token_ids, *so_far.token_ids.tolist()],
                                           rid=f"{ticket.rid}-{begin}", sampling=sampling,
                                           tally=self.tally, routed_layers=plan.routed_layers)
        if self._vocabulary is not None and result.output_ids.max() >= self._vocabulary:
            raise FleetError(f"request {ticket.rid}: the engine answered with token {result.output_ids.max()}, but the "
                             f"model's vocabulary has {self._vocabulary}")
        sampled = len(result.output_ids)
        goes_on = (result.finish is Finish.LENGTH and sampled == max_tokens
                   and begin + sampled < plan.max_response_tokens)
        finish = None if goes_on else result.finish
        return so_far.extended(result, finish=finish)

    async def judge(self, prompt: Prompt, transcript: Transcript) -> Judged:
        text = self._tokenizer.decode(transcript.token_ids, skip_special_tokens=True)
        judged = Judged(transcript.rollout(prompt), text, await self._scorer.score(prompt, text))
        return await self._taught(prompt, transcript, judged)

    async def _taught(self, prompt: Prompt, transcript: Transcript, judged: Judged) -> Judged:
        """With the log-probabilities of a teacher on a server, if the prompt's domain has one."""
        if self._teachers is None or judged.score.failed:
            return judged
        try:
            taught = await self._teachers.scored(judged.rollout, prompt.domain)
            for ids in (each.teacher_ids for each in taught.sequences if each.teacher_ids is not None):
                if self._vocabulary is not None and ids.max() >= self._vocabulary:
                    raise FleetError(f"the teacher of domain {prompt.domain} names token {ids.max()}, but the model's "
                                     f"vocabulary has {self._vocabulary}")
            return replace(judged, rollout=taught)
        except FleetError as failure:
            return self.failed(prompt, transcript, failure)

    def check_length(self, prompt: Prompt, plan: SamplingPlan) -> None:
        limit = self._config.max_context_tokens
        if len(prompt.token_ids) + plan.max_response_tokens > limit:
            raise ValueError(
                f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens, which with "
                f"rollout.max_response_tokens={plan.max_response_tokens} exceeds rollout.max_context_tokens={limit}"
            )


async def all_or_none(tasks: Sequence[asyncio.Task]) -> list:
    """All results; or the first failure, after every other task has been cancelled and has cleaned up."""
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        await cancelled(tasks)
        raise


async def cancelled(tasks: Sequence[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
