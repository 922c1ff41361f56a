"""The engines of a run, as the sampling side sees them: the fleet, the responder, the collector."""

from __future__ import annotations

from functools import partial

from megatron_rl.batch import BudgetFill
from megatron_rl.config.schema import Config
from megatron_rl.environment.agents import AgentPrograms
from megatron_rl.model.architectures import read_config
from megatron_rl.model.tokenizer import QuickText
from megatron_rl.reward import RewardPool
from megatron_rl.reward.user import score_of
from megatron_rl.rollout.background import cancel_others
from megatron_rl.rollout.client import engine_clients
from megatron_rl.rollout.collectors import (
    AheadCollector,
    BudgetedCollector,
    Collector,
    PartialAgentsCollector,
    PartialCollector,
    Prompts,
    SyncCollector,
)
from megatron_rl.rollout.engine_command import engine_key
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.responses import Responder
from megatron_rl.rollout.routed_experts import RoutedLayers
from megatron_rl.rollout.router import RoutedFleet, RouterClient
from megatron_rl.rollout.teachers import Teachers


def build_fleet(config: Config) -> Fleet:
    """A fleet that chooses the engine for a request itself, or lets sglang-router choose if there is one."""
    clients, engine = engine_clients(config), config.rollout.engine
    if engine.router is None:
        return Fleet(clients, config.rollout)
    if engine.router == "local":
        raise ValueError("rollout.engine.router=local is started with the engines; with rollout.engine.urls give the "
                         "router's URL")
    key = engine_key(engine)
    router = RouterClient(engine.router, timeout_s=config.rollout.request_timeout_s,
                          control_timeout_s=engine.control_timeout_s, api_key=key)
    return RoutedFleet(clients, router, config.rollout, key=key)


class Serving:
    """The engines of a run, watched. `async with Serving(config) as serving:` in the one event loop of a program."""

    def __init__(self, config: Config):
        self.fleet = build_fleet(config)
        self._agents: AgentPrograms | None = None

    async def __aenter__(self) -> Serving:
        await self.fleet.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """First cancels whatever still runs in the loop, so that its requests are aborted over open connections."""
        await cancel_others(but=self.fleet.watch)
        if self._agents is not None:
            await self._agents.close()
        await self.fleet.close()

    def responder(self, config: Config, tokenizer, rewards: RewardPool,
                  routed_layers: RoutedLayers | None = None, teachers: Teachers | None = None) -> Responder:
        if config.rollout.agent.kind is not None and self._agents is None:  # training and evaluation share the gateway
            self._agents = AgentPrograms(
                config.rollout, self.fleet, tokenizer, seed=config.run.seed, secrets=secret_variables(config),
                verdict=partial(score_of, correct_from=config.reward.correct_from))
        return Responder(self.fleet, config.rollout, QuickText(tokenizer), rewards, seed=config.run.seed,
                         eos_token_id=tokenizer.eos_token_id, routed_layers=routed_layers, agents=self._agents,
                         vocabulary=read_config(config.model.path).vocab_size, teachers=teachers)

    def agent_metrics(self, step: int) -> dict[str, float]:
        """What the agents of this step did; to be asked once."""
        return {} if self._agents is None else self._agents.take_metrics(step)


def secret_variables(config: Config) -> frozenset[str]:
    """Environment variables with keys, under names that the configuration gives; an agent has no use for them."""
    reward, teachers = config.reward, config.algo.distillation.teachers.values()
    return frozenset({config.rollout.engine.api_key_env, config.rollout.agent.key_env, reward.remote.key_env,
                      reward.judge.key_env, *(each.api_key_env for each in teachers)} - {None})


def engine_routing(config: Config) -> RoutedLayers | None:
    """The layers whose experts the engine should report; None unless algo.router_replay=rollout."""
    if config.algo.router_replay != "rollout":
        return None
    network = read_config(config.model.path)
    layers = range(network.num_hidden_layers)
    return RoutedLayers(network.num_hidden_layers, tuple(i for i in layers if not network.is_dense_layer(i)),
                        network.num_experts_per_tok, network.num_experts)


def build_collector(config: Config, responder: Responder, prompts: Prompts) -> Collector:
    """The collector that rollout.collector names."""
    rollout = config.rollout
    fill = BudgetFill(config.algo, config.parallel.dp, rollout.max_response_tokens)
    shared = {"prompts_per_step": rollout.prompts_per_step}
    if rollout.collector == "budgeted":
        return BudgetedCollector(responder, prompts, fill, **shared, overprovision=rollout.overprovision,
                                 seed=config.run.seed)
    if rollout.collector == "partial":
        kind = PartialCollector if rollout.agent.kind is None else PartialAgentsCollector
        return kind(responder, prompts, **shared, budget_tokens=rollout.budget_tokens or fill.tokens,
                    slice_tokens=rollout.slice_tokens, retention_steps=rollout.retention_steps,
                    concurrency=rollout.concurrency)
    if rollout.collector == "async":
        return AheadCollector(responder, prompts, **shared, max_staleness=rollout.max_staleness,
                              last_step=config.run.steps - 1)
    return SyncCollector(responder, prompts, **shared)
