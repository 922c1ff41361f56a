"""PROGRAM 1: builds the parts of the orchestrator and tells the story (loop.orchestrate).

The orchestrator holds no weights and opens no process group. If it is killed, the launcher starts it again. It then
goes on from the step that it offered last (state.py), while the trainer waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from megatron_rl import loop
from megatron_rl.config.load import to_dict
from megatron_rl.config.schema import Config
from megatron_rl.data import build_rated_sampler, build_sampler
from megatron_rl.handoff import load
from megatron_rl.model import checkpoint_files as files
from megatron_rl.model.architectures import read_config
from megatron_rl.model.tokenizer import QuickText, load_tokenizer, token_texts
from megatron_rl.observe import MetricsLog, Timers, lease
from megatron_rl.observe.timing import PhaseFile
from megatron_rl.orchestrator import stages, state
from megatron_rl.orchestrator.evaluation import Evaluator
from megatron_rl.orchestrator.port import TrainerPort
from megatron_rl.orchestrator.ranks import Ranks
from megatron_rl.orchestrator.record import RunRecord
from megatron_rl.orchestrator.rollouts import Rollouts
from megatron_rl.orchestrator.serving import Serving, build_collector, engine_routing
from megatron_rl.orchestrator.stages import Stage
from megatron_rl.orchestrator.weights import PublishedWeights
from megatron_rl.prompts import prompt_source
from megatron_rl.reward import RewardPool
from megatron_rl.rollout.teachers import Teachers


def run(config: Config) -> None:
    """One start of the orchestrator, to the end of the run or of its stage; orchestrator/end.json says how it ended."""
    lease.Watch(config.run.dir).start()
    asyncio.run(_run(config))


async def _run(config: Config) -> None:
    folder = Path(config.run.dir) / state.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    start = state.read_start(folder)
    again = start is not None
    if again:
        stage = stages.stage_at(config, start.stage, start.first_step, fresh=start.fresh).ending_at(start.last_step)
    else:
        stage, chosen = stages.current(config), files.choose(config.run)
        start = state.Start(None if chosen is None else str(chosen), stage.index, stage.first_step, stage.fresh,
                            stage.config.run.steps)
        start.write(folder)
    async with contextlib.AsyncExitStack() as stack:
        if state.read_end(folder) is not None:
            await _end_again(stage, stack)
        else:
            checkpoint = None if start.checkpoint is None else Path(start.checkpoint)
            await _whole_story(stage, stack, folder, checkpoint, again=again)


async def _whole_story(stage: Stage, stack: contextlib.AsyncExitStack, folder: Path, checkpoint: Path | None, *,
                       again: bool) -> None:
    config, offered = stage.config, state.read_offered(folder)
    if offered is not None:
        first_step = offered.step
    else:
        first_step = 0 if checkpoint is None else files.step_of(checkpoint)
    tokenizer = load_tokenizer(config.model)
    rewards = stack.enter_context(RewardPool(config.reward))
    source = prompt_source(config, config.data, tokenizer, rewards)
    rewards.check_domains(source.domains)
    rewards.warm_up()
    log = stack.enter_context(MetricsLog(config.run.dir, config.observe, to_dict(stage.whole),
                                         resume_step=_rows_until(config, checkpoint, offered, again)))
    port = TrainerPort(config.orchestrator, config.parallel.world_size)
    serving = await stack.enter_async_context(Serving(config))
    teachers = await stack.enter_async_context(Teachers(config.algo.distillation, config.rollout))
    await teachers.check_vocabulary(token_texts(tokenizer) if teachers.fleets else [])
    rates, order = config.rollout.pass_rate, (source, config.data, config.run.seed)
    rated = build_rated_sampler(*order, rates) if rates.enabled else None
    collector = build_collector(config, serving.responder(config, tokenizer, rewards, engine_routing(config), teachers),
                                rated or build_sampler(*order))
    if offered is not None:
        collector.load_state_dict(offered.collector)
    elif checkpoint is not None and stage.keeps_order:
        kept = load(files.read_whole(checkpoint, files.ORCHESTRATOR_STATE))["collector"]
        collector.load_state_dict(stage.carried(kept))
    weights = PublishedWeights(config, port, serving.fleet)
    rollouts = Rollouts(config, read_config(config.model.path), collector, weights, port, folder, offered,
                        counted=lambda step: {**serving.agent_metrics(step), **rewards.take_metrics()},
                        pieces=QuickText(tokenizer).pieces if config.algo.needs_sentences else None, rated=rated)
    if offered is None:
        rollouts.keep_state(first_step)
    ranks, phases = Ranks(port, stage, weights), PhaseFile(log.directory)
    record = RunRecord(config, log=log, evaluator=Evaluator(config, serving, tokenizer, rewards), serving=serving,
                       weights=weights, stage=stage, phases=phases)

    async def story() -> None:
        await ranks.start(checkpoint)
        ended = await loop.orchestrate(config, rollouts=rollouts, ranks=ranks, weights=weights, record=record,
                                       timers=Timers(phases.write), first_step=first_step,
                                       evaluated=offered is not None)
        state.write_end(folder, ended, is_last=stage.is_last)
        await _finish(ranks, stage, ended)

    await stack.enter_async_context(port)  # last: from here on an orchestrator that does not answer counts as hung
    await _watched(story(), port)


async def _end_again(stage: Stage, stack: contextlib.AsyncExitStack) -> None:
    """The orchestrator died while the trainer finished: it only has to tell the trainer to finish once more."""
    config = stage.config
    ended, _ = state.read_end(Path(config.run.dir) / state.FOLDER)
    port = await stack.enter_async_context(TrainerPort(config.orchestrator, config.parallel.world_size))
    await _watched(_finish(Ranks(port, stage, None), stage, ended), port)


async def _finish(ranks: Ranks, stage: Stage, ended: loop.Ended) -> None:
    finished = ended.how is not loop.End.STOPPED and (stage.is_last or ended.how is loop.End.UNFILLABLE)
    await ranks.finish(export_hf=finished and stage.config.run.export_hf)


async def _watched(story: Any, port: TrainerPort) -> None:
    """Runs the story until it ends or a rank hangs."""
    tasks = {asyncio.create_task(story), asyncio.create_task(port.watch())}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


def _rows_until(config: Config, checkpoint: Path | None, offered: state.OfferedStep | None, again: bool) -> int | None:
    """The last step whose metrics stay; None for a new run, whose folder must hold none."""
    if offered is not None:
        return offered.step
    if checkpoint is not None:
        return files.step_of(checkpoint)
    return -1 if config.run.resume or again else None
