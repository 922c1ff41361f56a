"""data.source -> a PromptSource: problems rendered and tokenised on access, with the length limit enforced."""

from __future__ import annotations

import logging
from typing import Any, Protocol

from megatron_rl.config.schema import DataConfig
from megatron_rl.data.arithmetic import Arithmetic
from megatron_rl.data.benchmarks import BENCHMARKS, read_benchmark
from megatron_rl.data.chains import Chains
from megatron_rl.data.files import FileProblems, read_problems
from megatron_rl.data.human_eval import HumanEval
from megatron_rl.data.problems import Problem, Problems
from megatron_rl.data.rows import FILE_SOURCES
from megatron_rl.data.templates import Template, build_template
from megatron_rl.types import Prompt

__all__ = ["ProblemSource", "PromptSource", "build_source"]

LISTED_PROMPTS = 20
_LOG = logging.getLogger(__name__)


class PromptSource(Protocol):
    """Prompts by index, the same prompt at every access.

    domains: every domain a prompt may carry (for RewardPool.check_domains before the first step).
    sft_example: (prompt, response token ids, end-of-sequence id included); ValueError without responses.
    """

    @property
    def domains(self) -> frozenset[str]: ...

    def __len__(self) -> int: ...

    def prompt(self, index: int) -> Prompt: ...

    def sft_example(self, index: int) -> tuple[Prompt, list[int]]: ...


class ProblemSource:
    """A PromptSource over any Problems. Raises IndexError outside [0, len)."""

    def __init__(self, problems: Problems, template: Template, tokenizer: Any, *, max_prompt_tokens: int):
        self._problems = problems
        self._template = template
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens

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
                             "a file with data.response_key")
        response_ids = self._tokenizer.encode(problem.response, add_special_tokens=False)
        return self._prompt(problem), [*response_ids, self._tokenizer.eos_token_id]

    def too_long(self) -> list[tuple[str, int]]:
        """(id, tokens) of every prompt that is over the limit; renders the whole source."""
        rendered = (self._render(self._problems[index]) for index in range(len(self)))
        return [(prompt.id, len(prompt.token_ids)) for prompt in rendered
                if len(prompt.token_ids) > self._max_prompt_tokens]

    def check_lengths(self) -> None:
        """ValueError listing every prompt that is over the limit."""
        if too_long := self.too_long():
            raise ValueError(self._length_message(too_long))

    def _problem(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of a source of {len(self)}")
        return self._problems[index]

    def _prompt(self, problem: Problem) -> Prompt:
        prompt = self._render(problem)
        if len(prompt.token_ids) > self._max_prompt_tokens:
            raise ValueError(self._length_message([(prompt.id, len(prompt.token_ids))]))
        return prompt

    def _render(self, problem: Problem) -> Prompt:
        text = self._template.render(problem.text)
        token_ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        return Prompt(problem.id, token_ids, text, problem.answer, problem.domain, problem.metadata)

    def _length_message(self, too_long: list[tuple[str, int]]) -> str:
        lines = [f"  {name}: {length} tokens" for name, length in too_long[:LISTED_PROMPTS]]
        if len(too_long) > LISTED_PROMPTS:
            lines.append(f"  and {len(too_long) - LISTED_PROMPTS} more")
        return "\n".join([
            f"{len(too_long)} prompt(s) longer than {self._max_prompt_tokens} tokens:", *lines,
            "A prompt may take rollout.max_context_tokens - rollout.max_response_tokens: "
            "raise the first, lower the second, or remove these prompts."])


def build_source(config: DataConfig, tokenizer: Any, *, max_prompt_tokens: int) -> PromptSource:
    """The source named by data.source. `tokenizer` is a Hugging Face tokenizer; the limit is in tokens.

    Generated prompts are made and checked on access, so any data.size is cheap to build. A file is read and
    checked whole. Raises ValueError that names the data.* key or the file and line at fault.
    """
    template = build_template(config, tokenizer)
    problems = _problems(config)
    source = ProblemSource(problems, template, tokenizer, max_prompt_tokens=max_prompt_tokens)
    if config.source not in (*FILE_SOURCES, *BENCHMARKS):
        return source
    if config.on_error == "stop":
        source.check_lengths()
    elif too_long := {name for name, _ in source.too_long()}:
        _LOG.warning("left out: %d prompt(s) of data.path=%s longer than %d tokens", len(too_long), config.path,
                     max_prompt_tokens)
        kept = FileProblems(problem for problem in problems if problem.id not in too_long)
        source = ProblemSource(kept, template, tokenizer, max_prompt_tokens=max_prompt_tokens)
    return source


def _problems(config: DataConfig) -> Problems:
    if config.source in FILE_SOURCES:
        return read_problems(config)
    if config.source in BENCHMARKS:
        return read_benchmark(config)
    if config.source == "reasoning_gym":
        from megatron_rl.data.gym import Gym  # here, because reasoning_gym takes 1.4 s to import
        return Gym(config.task, config.task_config, size=config.size, seed=config.seed, split=config.split)
    if config.source == "human_eval":
        return HumanEval(config.split)
    if config.source == "chains":
        return Chains(size=config.size, seed=config.seed, split=config.split, task_config=config.task_config)
    return Arithmetic(size=config.size, seed=config.seed, split=config.split)
