"""C3PO reinforcement learning: every rank of torchrun runs `run`."""

from __future__ import annotations

import contextlib
from pathlib import Path

from megatron_rl import loop, topology
from megatron_rl.config.load import to_dict
from megatron_rl.config.schema import Config
from megatron_rl.data import PromptSampler
from megatron_rl.model.checkpoint import Checkpoints
from megatron_rl.model.convert import Exporter
from megatron_rl.model.hf_folder import write_hf_folder
from megatron_rl.observe import MetricsLog, Timers
from megatron_rl.recipes.learner import PolicyLearner
from megatron_rl.recipes.parts import (BroadcastRollouts, PublishedWeights, RunRecord, build_expected,
                                       build_publisher)
from megatron_rl.recipes.serving import HeldOut, build_collector, engine_clients, load_tokenizer, prompt_source
from megatron_rl.reward import RewardPool


def run(config: Config) -> None:
    """Train from model.path (or the last checkpoint, run.resume) for run.steps steps; see loop.run."""
    here = topology.start(config.parallel, seed=config.run.seed)
    learner = PolicyLearner(config, here)
    checkpoints = Checkpoints(Path(config.run.dir) / "checkpoints", learner.policy, learner.optimizer, here,
                              keep=config.run.keep_checkpoints)
    state = restore(config, checkpoints)
    exporter = Exporter(learner.policy, here)
    with contextlib.ExitStack() as stack:
        first_step = 0 if state is None else state["step"]
        sampler = collector = publisher = expected = log = held_out = None
        clients = []
        if here.is_main:
            tokenizer = load_tokenizer(config.model.path)
            source = prompt_source(config, config.data, tokenizer)
            sampler = PromptSampler(source, config.run.seed, shuffle=config.data.shuffle)
            rewards = stack.enter_context(RewardPool(config.reward))
            rewards.check_domains(source.domains)
            rewards.warm_up()
            clients = engine_clients(config)
            collector = build_collector(config, clients, tokenizer, rewards)
            publisher = stack.enter_context(contextlib.closing(build_publisher(config, clients, here.device)))
            expected = build_expected(config, read_raw_config(config.model.path))
            held_out = HeldOut(config, collector, tokenizer)
            log = stack.enter_context(MetricsLog(config.run.dir, config.observe, to_dict(config),
                                                 resume_step=None if state is None else first_step))
        if state is not None:
            learner.updates_done = state["updates_done"]
            if sampler is not None:
                sampler.load_state_dict(state["data"])
        rollouts = BroadcastRollouts(config, here, sampler, collector)
        weights = PublishedWeights(exporter, here, publisher=publisher, expected=expected, clients=clients)

        def save(step: int) -> None:
            checkpoints.save(step, {"updates_done": learner.updates_done, "data": rollouts.state_dict()})

        record = RunRecord(config, here, log=log, held_out=held_out, weights=weights, save=save)
        loop.run(config, rollouts=rollouts, learner=learner, weights=weights, record=record, timers=Timers(),
                 first_step=first_step)
        if config.run.export_hf:
            export(config, exporter, here, Path(config.run.dir) / "hf")
    topology.stop()


def restore(config: Config, checkpoints: Checkpoints) -> dict | None:
    """The loop's state of the newest checkpoint, loaded, or None for a run from the start."""
    latest = checkpoints.latest()
    if not config.run.resume:
        if latest is not None:
            raise ValueError(f"{checkpoints.folder} holds checkpoints of an earlier run: continue it with "
                             "resume=true, or choose another run.dir")
        return None
    return None if latest is None else checkpoints.load(latest)


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
    import json

    return json.loads((Path(folder) / "config.json").read_text())
