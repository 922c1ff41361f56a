"""One step of curation, from a problem file to a folder with what stays, what goes and why.

Rules alone are in data/curation; here are the steps that ask a verifier or a served model (Sec. 2.3): answer
verification and model-aware difficulty. Samples are written as they come (samples.jsonl), so that a command that was
stopped goes on where it was.
"""

from __future__ import annotations

import asyncio
import json
import re
from argparse import Namespace
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rl.config.check import check_served_alone
from megatron_rl.config.rules import require
from megatron_rl.config.schema import Config, DataConfig
from megatron_rl.data.benchmarks import BENCHMARKS, read_benchmark
from megatron_rl.data.curation.clean import clean
from megatron_rl.data.curation.contamination import decontaminate
from megatron_rl.data.curation.duplicates import dedup
from megatron_rl.data.curation.items import Item, Removal, Split, problem_text, read_items, write_split
from megatron_rl.data.files import FileProblems, read_problems, report_bad
from megatron_rl.data.problems import Problem
from megatron_rl.data.rows import FILE_SOURCES
from megatron_rl.data.sources import Limits, ProblemSource
from megatron_rl.data.templates import build_template
from megatron_rl.launch.local import engines_for, terminable
from megatron_rl.model.architectures import read_config
from megatron_rl.model.tokenizer import load_tokenizer
from megatron_rl.observe.jsonl import read_jsonl
from megatron_rl.observe.verdicts import judged
from megatron_rl.orchestrator.serving import Serving
from megatron_rl.reward import RewardPool
from megatron_rl.reward.boxed import answer_part, last_boxed
from megatron_rl.rollout.responses import SamplingPlan
from megatron_rl.types import Prompt

__all__ = ["Sampled", "difficulty", "run", "verify"]

SAMPLES = "samples.jsonl"
PROMPTS_AT_A_TIME = 64
_COMMAND = re.compile(r"\\(?:text|mbox|mathrm|mathbf|operatorname|begin|end)\s{0,9}\{[^}]{0,200}\}"
                      r"|\\[A-Za-z]+")
_PROSE_WORD = re.compile(r"[A-Za-z]{3,}")
OWN_ANSWER = {"exact": "{}", "reasoning_gym": "\\boxed{{{}}}",
              **dict.fromkeys(("math_verify", "science"), "\\boxed{{\\displaystyle {}}}")}  # parsed, not only compared
"""Scorer -> a response that gives the reference itself. Programs and rewards of the user need a worked response."""


@dataclass(frozen=True)
class Sampled:
    """The judged responses of a served model to one problem: which are right, and what they boxed. Failed ones are left
    out, so there may be none."""

    correct: tuple[bool, ...]
    boxed: tuple[str | None, ...]

    @property
    def pass_rate(self) -> float:
        return sum(self.correct) / len(self.correct)


def run(config: Config, options: Namespace) -> dict[str, int]:
    """options: of `megatron-rl data STEP` (cli.py). Returns how many rows were read, kept and removed, by reason."""
    folder = Path(options.out)
    require(folder.is_dir() or not folder.exists(), f"--out {folder} is a file: name a folder")
    items, bad = read_items(config.data)
    return write_split(folder, _split(config, options, items, folder), bad)


def _split(config: Config, options: Namespace, items: Sequence[Item], folder: Path) -> Split:
    if options.step == "clean":
        return clean(items)
    if options.step == "dedup":
        return dedup(items, threshold=options.threshold, same_numbers=not options.ignore_numbers)
    if options.step == "decontaminate":
        return decontaminate(items, benchmark_problems(options.against), ngram=options.ngram,
                             share=options.share)
    samples = _samples(config, items, options.samples, folder)
    if options.step == "verify":
        return verify(items, config, samples, agreement=options.agreement)
    return difficulty(items, samples, model=config.model.path, keep_always_solved=options.keep_always_solved,
                             keep_never_solved=options.keep_never_solved)


def _samples(config: Config, items: Sequence[Item], number: int, folder: Path) -> list[Sampled]:
    """Judged samples of each problem by the model of model.path, served here or at rollout.engine.urls."""
    if number == 0:
        return []
    if not config.model.path:
        raise ValueError(f"--samples {number} asks a model: set model.path to its folder")
    check_served_alone(config)
    read_config(config.model.path)  # ValueError before an engine is started
    folder.mkdir(parents=True, exist_ok=True)
    with terminable(), engines_for(config, config.model.path, folder / "engine.log") as served:
        return sample(items, served, number, folder)


def benchmark_problems(given: Sequence[str]) -> Iterator[Problem]:
    """The problems of files given as KIND:FILE. ValueError for a kind that is none of data.source's files."""
    for each in given:
        kind, _, path = each.partition(":")
        if kind not in (*FILE_SOURCES, *BENCHMARKS) or not path:
            kinds = ", ".join((*FILE_SOURCES, *BENCHMARKS))
            raise ValueError(f"--against {each}: write KIND:FILE with one of {kinds}")
        read = read_benchmark if kind in BENCHMARKS else read_problems
        yield from read(DataConfig(source=kind, path=path, template="chat"))


def verify(items: Sequence[Item], config: Config, samples: Sequence[Sampled] = (), *,
           agreement: float = 0.5) -> Split:
    """Removes problems whose reference answer the scorer or models do not bear out.

    unjudgeable: the row lacks what the domain's scorer needs. unverifiable: the scorer does not accept a response that
    gives the reference itself, for math_verify and science in another spelling, so that no answer could meet it.
    prose_answer: an answer of several words, for math_verify. response_fails: the worked response of
    data.response_key is not right. models_disagree: no sample is right, and at least `agreement` of them box
    one and the same other answer.
    """
    questions: list[tuple[int, str, Prompt, str]] = []
    removed: dict[int, Removal] = {}
    with RewardPool(config.reward) as rewards:
        rewards.check_domains({item.problem.domain for item in items})
        for place, item in enumerate(items):
            problem = item.problem
            prompt = Prompt(problem.id, (), problem_text(problem), problem.answer, problem.domain, problem.metadata)
            route = config.reward.routes[problem.domain]
            try:
                rewards.check(prompt)
            except ValueError as error:
                removed[place] = Removal("unjudgeable", str(error)[:200])
                continue
            if route == "math_verify" and _is_prose(problem.answer):
                removed[place] = Removal("prose_answer", problem.answer[:200])
                continue
            if route in OWN_ANSWER and problem.answer:
                questions.append((place, "unverifiable", prompt, OWN_ANSWER[route].format(problem.answer)))
            if problem.response is not None:
                questions.append((place, "response_fails", prompt, problem.response))
        rewards.warm_up()
        scores = rewards.score_many([(prompt, text) for _, _, prompt, text in questions])
    for (place, why, prompt, _), score in zip(questions, scores, strict=True):
        if not score.correct:
            removed.setdefault(place, Removal(why, f"{score.status} {score.detail} (answer {prompt.answer!r})"[:200]))
    for place, sampled in enumerate(samples):
        if place not in removed and (removal := _disagreement(sampled, agreement)):
            removed[place] = removal
    return Split(items, removed)


def difficulty(items: Sequence[Item], samples: Sequence[Sampled], *, model: str, keep_always_solved: bool = False,
               keep_never_solved: bool = False) -> Split:
    """Notes each problem's pass rate in a column `difficulty` and removes those always and those never solved.

    A problem that this model never solves may be worth keeping when a stronger one does (the report's teacher): keep
    them here and run the stronger model over the kept file.
    """
    removed, notes = {}, {}
    for place, sampled in enumerate(samples):
        if not sampled.correct:  # every response failed: nothing is known of the problem
            continue
        rate = sampled.pass_rate
        notes[place] = {"difficulty": {"pass_rate": rate, "samples": len(sampled.correct), "model": model}}
        if rate == 1.0 and not keep_always_solved:
            removed[place] = Removal("always_solved", f"{len(sampled.correct)} of {len(sampled.correct)}")
        elif rate == 0.0 and not keep_never_solved:
            removed[place] = Removal("never_solved", f"0 of {len(sampled.correct)}")
    return Split(items, removed, notes)


def sample(items: Sequence[Item], config: Config, num_samples: int, folder: Path) -> list[Sampled]:
    """`num_samples` judged responses of what rollout.engine.urls serve to each problem, as rollout.* says.

    ValueError when `folder` holds samples of another run of it, or a prompt is too long.
    """
    header = {"model": config.model.path, "problems": len(items), "data": config.data.path, "samples": num_samples,
              "temperature": config.rollout.temperature, "max_response_tokens": config.rollout.max_response_tokens}
    path = folder / SAMPLES
    done = _resume(path, header)
    source = _source(items, config)

    async def write_as_they_come() -> None:
        with path.open("a", encoding="utf-8") as file:
            async for sampled in _sampled(source, len(done), config, num_samples):
                file.write(json.dumps({"id": items[len(done)].problem.id, "correct": sampled.correct,
                                       "boxed": sampled.boxed}) + "\n")
                file.flush()
                done.append(sampled)

    asyncio.run(write_as_they_come())
    return done


def _resume(path: Path, header: dict) -> list[Sampled]:
    """What an earlier call of the same sampling has written; a line cut short by a stop is dropped."""
    rows = read_jsonl(path) if path.is_file() else []
    if rows and rows[0] != header:
        raise ValueError(f"{path} holds samples of {rows[0]}, not of {header}: choose another --out")
    whole = [header, *rows[1:]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in whole), encoding="utf-8")
    return [Sampled(tuple(row["correct"]), tuple(row["boxed"])) for row in whole[1:]]


def _source(items: Sequence[Item], config: Config) -> ProblemSource:
    tokenizer = load_tokenizer(config.model)
    rollout = config.rollout
    limits = Limits(max_prompt_tokens=rollout.max_context_tokens - rollout.max_response_tokens,
                    vocabulary_size=read_config(config.model.path).vocab_size)
    source = ProblemSource(FileProblems(item.problem for item in items), build_template(config.data, tokenizer),
                           tokenizer, limits)
    if objections := source.objections(len(source)):
        report_bad(objections, replace(config.data, on_error="stop"))
    return source


async def _sampled(source: ProblemSource, first: int, config: Config, num_samples: int) -> AsyncIterator[Sampled]:
    if first == len(source):
        return
    rollout = config.rollout
    plan = SamplingPlan(samples_per_prompt=num_samples, temperature=rollout.temperature, top_p=rollout.top_p,
                        max_response_tokens=rollout.max_response_tokens, stop=rollout.stop)
    with RewardPool(config.reward) as rewards:
        rewards.check_domains(source.domains)
        rewards.warm_up()
        async with Serving(config) as serving:
            responder = serving.responder(config, load_tokenizer(config.model), rewards)
            for begin in range(first, len(source), PROMPTS_AT_A_TIME):
                prompts = [source.prompt(i) for i in range(begin, min(begin + PROMPTS_AT_A_TIME, len(source)))]
                for group in await responder.groups(prompts, step=0, first_index=begin, tag="curate", plan=plan):
                    if any(score.correct is None for score in group.scores):
                        raise ValueError(f"{group.prompt.id}: the scorer does not say which responses are right: set "
                                         "reward.correct_from, or return a Score with status correct or wrong")
                    yield Sampled(tuple(bool(score.correct) for score in judged(group)), tuple(
                        last_boxed(answer_part(text, group.prompt.text))
                        for text, score in zip(group.texts, group.scores, strict=True) if not score.failed))


def _disagreement(sampled: Sampled, agreement: float) -> Removal | None:
    answers = Counter(box for box in sampled.boxed if box)
    if not answers or sampled.pass_rate > 0:
        return None
    answer, count = answers.most_common(1)[0]
    if count < 2 or count / len(sampled.correct) < agreement:
        return None
    return Removal("models_disagree", f"{count} of {len(sampled.correct)} samples say {answer!r}"[:200])


def _is_prose(answer: str) -> bool:
    """Two words or more of plain text outside of LaTeX commands."""
    return len(_PROSE_WORD.findall(_COMMAND.sub(" ", answer))) > 1
