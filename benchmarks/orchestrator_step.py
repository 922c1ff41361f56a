"""One step of the orchestrator under a stub's answers, measured: the process of orchestrator_scale that is judged."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
import time
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.common import peak_growth_bytes
from benchmarks.sglang_stub import EOS
from megatron_rl.compat.quick_imports import quick_imports
from megatron_rl.config.load import load
from megatron_rl.config.orchestrator import RUN_KEY
from megatron_rl.config.rollout import ENGINE_KEY
from megatron_rl.config.schema import Config
from megatron_rl.handoff import read_shard
from megatron_rl.model.architectures import read_config
from megatron_rl.observe import Timers
from megatron_rl.orchestrator.allocator import keep_freed_memory
from megatron_rl.orchestrator.port import TrainerPort
from megatron_rl.orchestrator.rollouts import Rollouts
from megatron_rl.orchestrator.serving import Serving, build_collector
from megatron_rl.orchestrator.weights import PublishedWeights
from megatron_rl.reward import RewardPool
from megatron_rl.rollout.ports import choose_port
from megatron_rl.types import Prompt

PROMPT_TOKENS = 150
RANKS = 256
PROBE_S = 0.005
WARM_UP_STEP = 10**6


class NumberedPrompts:
    """Random prompts with a numeric answer, without end."""

    def __init__(self) -> None:
        self._drawn = 0

    def next(self, n: int) -> list[Prompt]:
        numbers = range(self._drawn, self._drawn + n)
        self._drawn += n
        return [Prompt(str(number), tuple(np.random.default_rng(number).integers(256, 9000, PROMPT_TOKENS).tolist()),
                       "a problem", "\\frac{1}{7}", "math") for number in numbers]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn}


class Orchestrator:
    """The parts of orchestrator/main.py that a step passes through, with prompts of our own and no trainer."""

    def __init__(self, config: Config, tokenizer: Any, rewards: RewardPool, folder: Path):
        self.config, self.prompts = config, NumberedPrompts()
        self._serving = Serving(config)
        responder = self._serving.responder(config, tokenizer, rewards)
        self._responder, self.port = responder, TrainerPort(config.orchestrator, config.parallel.world_size)
        self._rollouts = Rollouts(config, read_config(config.model.path),
                                  build_collector(config, responder, self.prompts),
                                  PublishedWeights(config, self.port, self._serving.fleet), self.port, folder,
                                  counted=self._serving.agent_metrics)
        self.lateness: list[float] = []

    async def open(self) -> None:
        """With everything loaded that the first responses would load."""
        await self._serving.__aenter__()
        await self.port.__aenter__()
        await self._responder.groups(self.prompts.next(1), step=WARM_UP_STEP)

    async def close(self) -> None:
        await self.port.__aexit__()
        await self._serving.__aexit__()

    async def step(self) -> None:
        probe = asyncio.create_task(self._probe())
        await self._rollouts.offer(0, Timers())
        probe.cancel()

    async def pulled(self) -> tuple[float, list[tuple[int, int, int]]]:
        """See pull."""
        return await asyncio.to_thread(pull, self.config)

    async def _probe(self) -> None:
        while True:
            due = time.perf_counter() + PROBE_S
            await asyncio.sleep(PROBE_S)
            self.lateness.append(time.perf_counter() - due)


def pull(config: Config) -> tuple[float, list[tuple[int, int, int]]]:
    """What the ranks do: processor seconds of this thread, and by data-parallel rank (bytes that it reads, bytes of its
    tokens' arrays, its tokens)."""
    began, read = time.thread_time(), []
    key = {"Authorization": f"Bearer {os.environ[RUN_KEY]}"}
    connection = HTTPConnection(config.orchestrator.host, config.orchestrator.port)
    for dp_rank in range(config.parallel.dp):
        connection.request("GET", f"/step/0/shard/{dp_rank}", headers=key)
        body = connection.getresponse().read()
        samples = [sample for update in read_shard(body) for sample in update.samples]
        arrays = [each for sample in samples
                  for each in (sample.token_ids, sample.loss_mask, sample.rollout_logprobs)]
        read.append((len(body), sum(array.nbytes for array in arrays), sum(len(s.token_ids) for s in samples)))
    connection.close()
    return time.thread_time() - began, read


def step_config(folder: Path, url: str, fraction: float, collector: str) -> Config:
    """ring_lite_rl_stage1 with a fraction of its prompts and ranks; one round of sampling."""
    order = "groups" if collector == "budgeted" else "responses"
    config = load(["experiment=ring_lite_rl_stage1", f"model.path={folder}", f"run.dir={folder}", "parallel.ep=1",
                   f"parallel.world_size={max(1, round(RANKS * fraction))}", "algo.underfull=train_short",
                   f"algo.order={order}", f"rollout.collector={collector}",
                   f"rollout.prompts_per_step={max(1, round(512 * fraction))}", f"rollout.engine.urls=[{url}]",
                   "reward.workers=1"])
    return replace(config, orchestrator=replace(config.orchestrator, port=choose_port(None)))


def measured_step(folder: Path, url: str, fraction: float, collector: str) -> dict[str, Any]:
    """One step of `fraction` of the real one."""
    keep_freed_memory()
    os.environ.update({ENGINE_KEY: "stub", RUN_KEY: "stub"})
    with quick_imports():
        from transformers import PreTrainedTokenizerFast

    config = step_config(folder, url, fraction, collector)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=EOS)
    with RewardPool(config.reward) as rewards, asyncio.Runner() as runner:
        before = set(threading.enumerate())
        rewards.warm_up()
        pools = {thread.native_id for thread in set(threading.enumerate()) - before}
        parts = Orchestrator(config, tokenizer, rewards, folder)
        runner.run(parts.open())
        judged, began, cpu = _judges_cpu_s(pools), time.perf_counter(), _own_cpu_s(pools)
        growth = peak_growth_bytes(lambda: runner.run(parts.step()))
        seconds = time.perf_counter() - began
        ranks_cpu, read = runner.run(parts.pulled())
        cpu, judged = _own_cpu_s(pools) - cpu - ranks_cpu, _judges_cpu_s(pools) - judged
        runner.run(parts.close())
    tokens = sum(count for _, _, count in read)
    late = np.array(parts.lateness)
    return {"fraction": fraction, "responses": config.rollout.prompts_per_step * config.rollout.responses_per_prompt,
            "ranks": config.parallel.dp, "tokens": tokens, "seconds": seconds, "cpu_s": cpu, "judges_cpu_s": judged,
            "ranks_cpu_s": ranks_cpu,
            "cpu_s_per_mtoken": cpu / tokens * 1e6, "bytes_per_token": growth / tokens,
            "late_ms_p999": 1000 * float(np.quantile(late, 0.999)), "late_ms_max": 1000 * float(late.max()),
            "late_looks": len(late), "read_over_own": max(body / own for body, own, _ in read),
            "largest_share_read": max(body for body, _, _ in read) / sum(body for body, _, _ in read)}


def _own_cpu_s(pools: set[int]) -> float:
    """Processor seconds of this process, without the threads that hand responses to the judges."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime - _threads_cpu_s(pools)


def _judges_cpu_s(pools: set[int]) -> float:
    """Processor seconds of the processes that judge, and of the threads here that feed them."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(each.user + each.system for each in times) + _threads_cpu_s(pools)


def _threads_cpu_s(ids: set[int]) -> float:
    return sum(each.user_time + each.system_time for each in psutil.Process().threads() if each.id in ids)
