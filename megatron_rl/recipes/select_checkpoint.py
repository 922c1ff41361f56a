"""Which SFT checkpoint RL starts from: by its entropy on the RL prompts, not by its score (Sec. 4.3.2).

Entropy is estimated by -log p of the tokens that the policy samples itself at temperature 1, which has the exact
entropy as its mean; its interval is over problems.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from megatron_rl.config.check import check_served_alone
from megatron_rl.config.schema import Config, SelectConfig
from megatron_rl.model.tokenizer import load_tokenizer
from megatron_rl.observe.estimators import pass_at_k
from megatron_rl.observe.failures import bear_failures
from megatron_rl.observe.files import write_json
from megatron_rl.observe.selection_plot import plot_selection
from megatron_rl.observe.stats import bootstrap_interval
from megatron_rl.observe.verdicts import judged, known, number_right
from megatron_rl.orchestrator.serving import Serving
from megatron_rl.prompts import prompt_source
from megatron_rl.reward import RewardPool
from megatron_rl.rollout.responses import SamplingPlan
from megatron_rl.types import Finish, Prompt, RolloutGroup

__all__ = ["Candidate", "Decision", "choose", "folder", "measure", "run", "table"]

EPOCH = "epoch.json"  # as recipes/sft.py writes it
DECISION, PLOT = "decision.json", "selection.png"


@dataclass(frozen=True)
class Candidate:
    """One checkpoint: what its own samples on the RL prompts look like. Lengths in tokens, entropy in nats per token.

    token_efficiency: tokens that RL will train on / tokens that SFT has trained on; None where SFT left no count.
    """

    path: str
    epoch: int
    sft_tokens: int | None
    token_efficiency: float | None
    entropy: float
    entropy_low: float
    entropy_high: float
    mean_length: float
    length_variance: float
    truncated_fraction: float
    pass_at_1: float
    pass_at_k: float
    samples: int


@dataclass(frozen=True)
class Decision:
    """The checkpoint to start from, why, and what it was chosen from under which rule."""

    chosen: str
    why: str
    rule: SelectConfig
    candidates: tuple[Candidate, ...]


def folder(config: Config) -> Path:
    return Path(config.run.dir) / "selection"


def run(config: Config, engines_for: Callable[[Config, str, Path], AbstractContextManager[Config]]) -> Decision:
    """Measure every epoch of select.folder and choose; writes <run.dir>/selection/decision.json and selection.png.

    An engine is started for each checkpoint in turn. ValueError when there is no checkpoint, or when engines are given.
    """
    check_served_alone(config)
    if config.rollout.engine.urls:
        raise ValueError("rollout.engine.urls: select-checkpoint serves one checkpoint after the other and starts its "
                         "own engines; leave it empty")
    if config.rollout.temperature != 1.0:
        raise ValueError(f"rollout.temperature={config.rollout.temperature}: the entropy is that of the policy at 1.0")
    if not config.select.folder:
        raise ValueError("select.folder is not set: name the run.dir of an SFT run with sft.export_epochs=true")
    paths = sorted(path.parent for path in Path(config.select.folder).glob("epochs/epoch_*/config.json"))
    if not paths:
        raise ValueError(f"select.folder={config.select.folder} has no epochs/epoch_01 and so on: run SFT with "
                         "sft.export_epochs=true")
    candidates = []
    models = [dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(path))) for path in paths]
    with RewardPool(config.reward) as rewards:
        asked(models[0], load_tokenizer(models[0].model), rewards)  # before an engine starts
        folder(config).mkdir(parents=True, exist_ok=True)
        rewards.warm_up()
        for path, model in zip(paths, models, strict=True):
            with engines_for(model, str(path), folder(config) / f"engine-{path.name}.log") as served:
                candidates.append(measure(served, sample(served, rewards), path))
    decision = choose(candidates, config.select)
    write_json(folder(config) / DECISION, asdict(decision))
    plot_selection([asdict(candidate) for candidate in candidates], config.select.entropy_low,
                   config.select.entropy_high, decision.chosen, folder(config) / PLOT)
    return decision


def asked(config: Config, tokenizer, rewards: RewardPool) -> list[Prompt]:
    """The first select.problems RL prompts. ValueError if they cannot be had or judged."""
    source = prompt_source(config, config.data, tokenizer, rewards)
    rewards.check_domains(source.domains)
    return [source.prompt(i) for i in range(min(config.select.problems, len(source)))]


def sample(config: Config, rewards: RewardPool) -> list[RolloutGroup]:
    """select.samples judged responses to each of the prompts."""
    tokenizer, rollout = load_tokenizer(config.model), config.rollout
    prompts = asked(config, tokenizer, rewards)
    plan = SamplingPlan(samples_per_prompt=config.select.samples, temperature=1.0, top_p=1.0,
                        max_response_tokens=rollout.max_response_tokens, stop=rollout.stop)

    async def answers() -> list[RolloutGroup]:
        async with Serving(config) as serving:
            return await serving.responder(config, tokenizer, rewards).groups(prompts, step=0, tag="select", plan=plan)

    return asyncio.run(answers())


def measure(config: Config, groups: Sequence[RolloutGroup], path: Path) -> Candidate:
    """What `groups`, sampled by the checkpoint in `path`, say of it. Failed responses count nowhere.

    TooManyFailures if their share exceeds rollout.max_failed_fraction.
    """
    bear_failures(groups, what=f"selection of {path}", max_fraction=config.rollout.max_failed_fraction)
    by_problem = [[rollout for rollout, score in zip(group.rollouts, group.scores, strict=True) if not score.failed]
                  for group in groups]
    surprises = [np.concatenate([-sequence.rollout_logprobs[sequence.trainable]
                                 for rollout in rollouts for sequence in rollout.sequences])
                 for rollouts in by_problem if rollouts]
    if not surprises:
        raise ValueError(f"{path}: every response failed, so nothing can be said of it; the warning above says why")
    entropy, low, high = bootstrap_interval(surprises, config.eval.bootstrap_resamples, config.eval.seed)
    rollouts = [rollout for each in by_problem for rollout in each]
    lengths = np.array([rollout.response_tokens for rollout in rollouts], dtype=np.float64)
    k, whole = len(groups[0].scores), known(groups)
    if any(score.correct is None for group in groups for score in group.scores):
        raise ValueError("select-checkpoint needs to know which responses are right, and the scorer does not say: set "
                         "reward.correct_from, or return a Score with status correct or wrong")
    right = [(len(judged(group)), number_right(group)) for group in whole]
    record = path / EPOCH
    sft = json.loads(record.read_text()) if record.is_file() else {}
    return Candidate(
        path=str(path), epoch=sft.get("epoch", int(path.name.rpartition("_")[2])), sft_tokens=sft.get("tokens"),
        token_efficiency=rl_tokens(config) / sft["tokens"] if config.algo.has_budget and "tokens" in sft else None,
        entropy=entropy, entropy_low=low, entropy_high=high, mean_length=float(lengths.mean()),
        length_variance=float(lengths.var()), samples=k,
        truncated_fraction=float(np.mean([rollout.finish is Finish.LENGTH for rollout in rollouts])),
        pass_at_1=float(np.mean([pass_at_k(n, c, 1) for n, c in right])),
        pass_at_k=float(np.mean([pass_at_k(n, c, n) for n, c in right])))


def rl_tokens(config: Config) -> int:
    """Tokens that the RL run will train on: known beforehand, since every step has exactly Phi."""
    algo = config.algo
    return config.run.steps * algo.updates_per_rollout * algo.phi_global(config.parallel.dp)


def choose(candidates: Sequence[Candidate], rule: SelectConfig) -> Decision:
    """The decision of `rule` among candidates, which must not be empty; the earliest where they are level."""

    def decided(chosen: Candidate, why: str) -> Decision:
        return Decision(chosen.path, why, rule, tuple(candidates))

    def best(among: Sequence[Candidate], by: str) -> Candidate:
        return max(among, key=lambda candidate: getattr(candidate, by))

    if rule.rule != "entropy":
        return decided(best(candidates, rule.rule), f"best {rule.rule} of all")
    band = f"{rule.entropy_low:g} to {rule.entropy_high:g}"
    inside = [each for each in candidates if rule.entropy_low <= each.entropy <= rule.entropy_high]
    if inside:
        chosen = best(inside, rule.prefer)
        return decided(chosen, f"entropy {chosen.entropy:.3f}; best {rule.prefer} of {len(inside)} within {band}")
    nearest = min(candidates, key=lambda each: max(rule.entropy_low - each.entropy, each.entropy - rule.entropy_high))
    return decided(nearest, f"no entropy within {band}; {nearest.entropy:.3f} is the nearest")


def table(decision: Decision) -> Table:
    shown = Table("epoch", "entropy", "mean length", "length variance", "truncated", "pass@1",
                  f"pass@{decision.candidates[0].samples}", "SFT tokens", "RL / SFT tokens",
                  title="checkpoints on the RL prompts")
    for each in decision.candidates:
        marked = "bold" if each.path == decision.chosen else None
        shown.add_row(
            str(each.epoch), f"{each.entropy:.3f} [{each.entropy_low:.3f}, {each.entropy_high:.3f}]",
            f"{each.mean_length:.1f}", f"{each.length_variance:.1f}", f"{each.truncated_fraction:.3f}",
            f"{each.pass_at_1:.3f}", f"{each.pass_at_k:.3f}",
            "-" if each.sft_tokens is None else f"{each.sft_tokens:,}",
            "-" if each.token_efficiency is None else f"{each.token_efficiency:.3f}", style=marked)
    return shown
