"""C3PO reinforcement learning: every rank of torchrun runs `run`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rl import loop, topology
from megatron_rl.config.load import to_dict
from megatron_rl.config.schema import Config
from megatron_rl.data import build_sampler
from megatron_rl.model.architectures import read_config
from megatron_rl.model.checkpoint import Checkpoints
from megatron_rl.model.convert import Exporter
from megatron_rl.model.hf_folder import write_hf_folder
from megatron_rl.observe import MetricsLog, Timers
from megatron_rl.observe.timing import PhaseFile
from megatron_rl.recipes import stages, stop
from megatron_rl.recipes.colocated import ColocatedLearner, engine_memory
from megatron_rl.recipes.evaluation import Evaluator
from megatron_rl.recipes.learner import PolicyLearner
from megatron_rl.recipes.parts import BroadcastRollouts, RunRecord
from megatron_rl.recipes.probe import Probe
from megatron_rl.recipes.routing import engine_routing
from megatron_rl.recipes.serving import Serving, build_collector, engine_clients, load_tokenizer, prompt_source
from megatron_rl.recipes.stages import Stage
from megatron_rl.recipes.weights import Channel, PublishedWeights, build_publisher
from megatron_rl.reward import RewardPool


@dataclass
class RunParts:
    """What loop.run needs, built for this rank."""

    rollouts: BroadcastRollouts
    learner: loop.Learner
    weights: PublishedWeights
    record: RunRecord
    first_step: int
    exporter: Exporter
    checkpoints: Checkpoints
    topology: topology.Topology
    phases: PhaseFile | None


def run(config: Config) -> bool:
    """Train from model.path (or the last checkpoint, run.resume) for run.steps steps, see loop.run; or, with `stages`,
    to the end of the stage that is next. Returns whether nothing is left to do."""
    stage = stages.current(config)
    config = stage.config
    with build_run(stage) as parts:
        finished = loop.run(config, rollouts=parts.rollouts, learner=parts.learner, weights=parts.weights,
                            record=parts.record, timers=Timers(parts.phases and parts.phases.write),
                            first_step=parts.first_step)
        parts.checkpoints.finish()
        if finished and stage.is_last and config.run.export_hf:
            export(config, parts.exporter, parts.topology, Path(config.run.dir) / "hf")
    topology.stop()
    if not finished:
        stop.leave()
    return stage.is_last


@contextlib.contextmanager
def build_run(stage: Stage) -> Iterator[RunParts]:
    """Everything of one run on this rank; what speaks to the outside is closed at the end."""
    config = stage.config
    here = topology.start(config.parallel, seed=config.run.seed)
    learner = PolicyLearner(config, here, stage.schedule_updates, stage.number)
    checkpoints = Checkpoints(config.run, learner.policy, learner.optimizer, here)
    state = checkpoints.restore()
    first_step = 0 if state is None else state["step"]
    with contextlib.ExitStack() as stack:
        main = MainRank(stage, here, stack, log_until=log_until(config, state)) if here.is_main else None
        serving = main.serving if main else None
        probe = Probe(learner, config, here)
        weights = PublishedWeights(learner.exporter, here, probe, main.channel(probe) if main else None)
        rollouts = BroadcastRollouts(here, weights, serving, main.collector if main else None)
        if state is not None:
            learner.load_state_dict(state)
            if stage.keeps_order:
                rollouts.load_state_dict(state["rollouts"])
            if stage.resets_optimizer:
                checkpoints.reset_optimizer()
                learner.updates_done = 0

        def save(step: int, over: bool) -> None:
            checkpoints.save(step, {**learner.state_dict(), **stage.state(over=over)}, rollouts.state_dict())

        record = RunRecord(config, here, network=learner.policy.config,
                           log=main.log if main else None, evaluator=main.evaluator if main else None,
                           serving=serving, rollouts=rollouts, weights=weights, save=save, poll_save=checkpoints.poll,
                           stage=stage)
        learning = ColocatedLearner(learner, weights) if config.rollout.engine.colocate else learner
        yield RunParts(rollouts, learning, weights, record, first_step, learner.exporter, checkpoints, here,
                       record.phases)


class MainRank:
    """What only rank 0 has: prompts, rewards, engines, the log. Closed with `stack`."""

    def __init__(self, stage: Stage, here: topology.Topology, stack: contextlib.ExitStack, *,
                 log_until: int | None):
        config = stage.config
        tokenizer = load_tokenizer(config.model)
        rewards = stack.enter_context(RewardPool(config.reward))
        source = prompt_source(config, config.data, tokenizer, rewards)
        rewards.check_domains(source.domains)
        rewards.warm_up()
        self.serving = stack.enter_context(Serving(config))
        self.collector = build_collector(
            config, self.serving.responder(config, tokenizer, rewards, engine_routing(config)),
            build_sampler(source, config.data, config.run.seed))
        self.clients = engine_clients(config)
        self.memory = engine_memory(config, here.device)
        self.publisher = stack.enter_context(contextlib.closing(
            build_publisher(config, self.clients, here.device, self.memory)))
        self.evaluator = Evaluator(config, self.serving, tokenizer, rewards)
        self.log = stack.enter_context(MetricsLog(config.run.dir, config.observe, to_dict(stage.whole),
                                                  resume_step=log_until))
        self._config = config

    def channel(self, probe: Probe) -> Channel:
        return Channel(self._config, asdict(read_config(self._config.model.path)), self.serving, self.clients,
                       self.publisher, probe.token_ids, self.memory)


def log_until(config: Config, state: dict | None) -> int | None:
    """The last step whose metrics stay when a run goes on: the checkpoint's, none if it was killed before its first.

    None for a new run.
    """
    if state is not None:
        return state["step"]
    return -1 if config.run.resume else None


def export(config: Config, exporter: Exporter, here: topology.Topology, folder: Path) -> None:
    """Write the policy as a Hugging Face folder, with the tokenizer of model.path."""
    tensors = exporter()
    if here.is_main:
        write_hf_folder(folder, read_raw_config(config.model.path), tensors, tokenizer_from=Path(config.model.path))
    else:
        for _ in tensors:
            pass
    here.barrier()


def read_raw_config(folder: str) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())
