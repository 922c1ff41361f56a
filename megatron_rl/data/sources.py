"""data.source -> a PromptSource: problems rendered and tokenised on access, with its limits enforced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_rl.config.schema import DataConfig
from megatron_rl.data.arithmetic import Arithmetic
from megatron_rl.data.benchmarks import BENCHMARKS, read_benchmark
from megatron_rl.data.chains import Chains
from megatron_rl.data.files import FileProblems, missing, read_problems, report_bad
from megatron_rl.data.human_eval import HumanEval
from megatron_rl.data.problems import Problem, Problems, asked, in_split
from megatron_rl.data.rows import FILE_SOURCES
from megatron_rl.data.templates import Template, build_template
from megatron_rl.types import Prompt

__all__ = ["Limits", "ProblemSource", "PromptSource", "build_source"]


class PromptSource(Protocol):
    """Prompts by index; an index gives the same prompt at every access.

    - domains: every domain that a prompt may carry (for RewardPool.check_domains before the first step).
    - sft_example: (prompt, response token ids, end-of-sequence id included); ValueError without responses.
    - objections: among the first `number` problems, those that cannot be used and were not checked yet, with the
      reason.
    - questions: what the problems of files ask (problems.asked); nothing for generators.
    """

    @property
    def domains(self) -> frozenset[str]: ...

    def __len__(self) -> int: ...

    def prompt(self, index: int) -> Prompt: ...

    def sft_example(self, index: int) -> tuple[Prompt, list[int]]: ...

    def objections(self, number: int) -> list[str]: ...

    def questions(self) -> frozenset[str]: ...


@dataclass(frozen=True)
class Limits:
    """What a prompt may be; None: no limit.

    - vocabulary_size: token ids must lie below it.
    - check: raises ValueError if no reward can judge the prompt.
    - max_example_tokens: limit of a prompt with its response, which every problem must then have (SFT).
    """

    max_prompt_tokens: int | None = None
    vocabulary_size: int | None = None
    check: Callable[[Prompt], None] | None = None
    max_example_tokens: int | None = None


class ProblemSource:
    """A PromptSource over any Problems. Raises IndexError outside [0, len)."""

    def __init__(self, problems: Problems, template: Template, tokenizer: Any, limits: Limits):
        self._problems = problems
        self._template = template
        self._tokenizer = tokenizer
        self._limits = limits
        self._checked = False

    @property
    def domains(self) -> frozenset[str]:
        return self._problems.domains

    def __len__(self) -> int:
        return len(self._problems)

    def prompt(self, index: int) -> Prompt:
        return self._prompt(self._problem(index))

    def sft_example(self, index: int) -> tuple[Prompt, list[int]]:
        problem = self._problem(index)
        if problem.response is None:
            raise ValueError(f"{problem.id} has no response to train on: SFT needs data.source=chains, or "
                             "a file with data.response_key, or chats that end with the assistant's answer")
        response_ids = [*self._tokenizer.encode(problem.response, add_special_tokens=False),
                        self._tokenizer.eos_token_id]
        self._check_ids(problem.id, "response", response_ids)
        prompt, room = self._prompt(problem), self._limits.max_example_tokens
        if room is not None and (tokens := len(prompt.token_ids) + len(response_ids)) > room:
            raise ValueError(f"{problem.id}: prompt and response have {tokens} tokens, {room} fit: raise "
                             "batch.tokens_per_microbatch (or parallel.cp), up to the model's max_position_embeddings, "
                             "or remove the example")
        return prompt, response_ids

    def objections(self, number: int) -> list[str]:
        places = range(0 if self._checked else min(number, len(self)))
        return [f"{self._problems[place].id}: {why}" for place in places if (why := self.objection(place)) is not None]

    def questions(self) -> frozenset[str]:
        return frozenset(asked(each.text) for each in self._problems) if self._checked else frozenset()

    def objection(self, index: int) -> str | None:
        """The reason why problem `index` cannot be used; None if it can."""
        try:
            prompt = (self.prompt(index) if self._limits.max_example_tokens is None else self.sft_example(index)[0])
            if self._limits.check is not None:
                self._limits.check(prompt)
        except ValueError as error:
            name = self._problems[index].id
            return str(error).removeprefix(f"prompt {name}: ").removeprefix(f"{name}: ")
        return None

    def without(self, problems: FileProblems, left_out: Collection[int]) -> ProblemSource:
        """A source of the same problems, except those at these places. All of them have been checked."""
        kept = FileProblems((each for place, each in enumerate(problems) if place not in left_out), problems.places)
        source = ProblemSource(kept, self._template, self._tokenizer, self._limits)
        source._checked = True
        return source

    def _problem(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of a source of {len(self)}")
        return self._problems[index]

    def _prompt(self, problem: Problem) -> Prompt:
        text = self._template.render(problem.text)
        token_ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        if (most := self._limits.max_prompt_tokens) is not None and len(token_ids) > most:
            raise ValueError(f"{problem.id}: {len(token_ids)} tokens, longer than {most}. A "
                             "prompt may take rollout.max_context_tokens - rollout.max_response_tokens: raise the "
                             "first, lower the second, or remove it")
        self._check_ids(problem.id, "prompt", token_ids)
        return Prompt(problem.id, token_ids, text, problem.answer, problem.domain, problem.metadata)

    def _check_ids(self, name: str, what: str, token_ids: Sequence[int]) -> None:
        size = self._limits.vocabulary_size
        if size is not None and max(token_ids, default=0) >= size:
            beyond = max(token_ids)
            piece = self._tokenizer.convert_ids_to_tokens(beyond)
            raise ValueError(f"{name}: its {what} holds token {beyond} ({piece}), but the model knows {size} tokens "
                             "(vocab_size in config.json): this tokenizer belongs to another model")


def build_source(config: DataConfig, tokenizer: Any, limits: Limits) -> PromptSource:
    """The source that data.source names. `tokenizer` is a Hugging Face tokenizer.

    Generated prompts are made and checked on access, so any data.size is cheap to build. A file is read and checked as
    a whole. ValueError names the faulty data.* key, or file and line.
    """
    template = build_template(config, tokenizer)
    problems = _problems(config)
    source = ProblemSource(problems, template, tokenizer, limits)
    if not isinstance(problems, FileProblems):
        return source
    objections = {index: why for index in range(len(source)) if (why := source.objection(index)) is not None}
    if objections:
        report_bad([_named(problems, index, why, config) for index, why in objections.items()], config)
    if len(objections) == len(problems):
        raise ValueError(f"data.path={config.path}: data.on_error=skip left out every problem")
    return source.without(problems, objections)


def _named(problems: FileProblems, index: int, why: str, config: DataConfig) -> str:
    """The objection with the row's place and, if the answer is missing, the columns that might hold one."""
    problem = problems[index]
    place = problems.places.get(problem.id, problem.id)
    if not problem.answer and "answer" in why and config.source in (*FILE_SOURCES, "function"):
        why = f"{why}; {missing(problem.metadata, 'answer_key', config.answer_key)}"
    return f"{place}: {why}"


def _in_split(problems: FileProblems, config: DataConfig) -> FileProblems:
    chosen = FileProblems((problem for problem in problems if in_split(problem.text, config.split)), problems.places)
    chosen.skipped = problems.skipped
    if not chosen:
        raise ValueError(f"data.path={config.path} has {len(problems)} problem(s), none of them in "
                         f"data.split={config.split}, which parts them by a hash of the text: give more, or train on "
                         "all (data.split=all) and evaluate on others (eval.data) or on none (eval.problems=0)")
    return chosen


def _problems(config: DataConfig) -> Problems:
    if config.source in (*FILE_SOURCES, "function"):
        return _in_split(read_problems(config), config)
    if config.source in BENCHMARKS:
        return _in_split(read_benchmark(config), config)
    if config.source == "reasoning_gym":
        from megatron_rl.data.gym import Gym  # here, because reasoning_gym takes 1.4 s to import
        return Gym(config.task, config.task_config, size=config.size, seed=config.seed, split=config.split)
    if config.source == "human_eval":
        return HumanEval(config.split)
    if config.source == "chains":
        return Chains(size=config.size, seed=config.seed, split=config.split, task_config=config.task_config)
    return Arithmetic(size=config.size, seed=config.seed, split=config.split)
