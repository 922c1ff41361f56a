"""What needs engines but no trainer: the prompts and the collector. No megatron here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.batch import BudgetFill
from megatron_rl.compat.quick_imports import quick_imports
from megatron_rl.config.schema import Config, DataConfig, ModelConfig
from megatron_rl.data import Limits, PromptSource, build_prompts, heldout
from megatron_rl.model.architectures import read_config
from megatron_rl.model.hf_folder import refuse_code
from megatron_rl.reward import RewardPool
from megatron_rl.rollout.background import EventLoopThread
from megatron_rl.rollout.client import EngineClient
from megatron_rl.rollout.collectors import (
    AheadCollector,
    BudgetedCollector,
    Collector,
    PartialCollector,
    Prompts,
    SyncCollector,
)
from megatron_rl.rollout.engine_command import engine_key
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.responses import Responder
from megatron_rl.rollout.routed_experts import RoutedLayers
from megatron_rl.rollout.router import RoutedFleet, RouterClient

LISTED_EXAMPLES = 20


def load_tokenizer(model: ModelConfig):
    """The tokenizer of the Hugging Face folder model.path; the model's own class is not needed for it."""
    folder = model.path
    refuse_code(folder, trusted=model.trust_remote_code)
    with quick_imports():
        from transformers import AutoTokenizer  # here, because ranks other than 0 have no use for it, and it is slow

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (ValueError, OSError) as error:
        files = sorted(path.name for path in Path(folder).glob("*token*"))
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"model.path={folder}: no tokenizer can be read there (files: {', '.join(files) or 'none'}); "
                         f"copy tokenizer.json and tokenizer_config.json into it ({why})") from error


def prompt_source(config: Config, data: DataConfig, tokenizer, rewards: RewardPool | None = None) -> PromptSource:
    """The prompts of `data`. rewards: every row of a file must hold what its scorer needs."""
    rollout = config.rollout
    return build_prompts(data, tokenizer, Limits(
        max_prompt_tokens=rollout.max_context_tokens - rollout.max_response_tokens,
        vocabulary_size=read_config(config.model.path).vocab_size, check=None if rewards is None else rewards.check))


def sft_source(config: Config, tokenizer) -> PromptSource:
    """The examples of supervised fine-tuning, all of them checked.

    ValueError if there are too few, or one has no response, is too long, or holds a token that the model does not know.
    """
    network = read_config(config.model.path)
    room = min(config.batch.tokens_per_microbatch * config.parallel.cp, network.max_position_embeddings)
    source = build_prompts(config.data, tokenizer, Limits(vocabulary_size=network.vocab_size, max_example_tokens=room))
    if len(source) < config.sft.examples:
        raise ValueError(f"sft.examples={config.sft.examples}, but data has {len(source)} examples: set "
                         f"sft.examples={len(source)} or give more")
    if objections := source.objections(config.sft.examples):
        listed = "\n  ".join(objections[:LISTED_EXAMPLES])
        raise ValueError(f"{len(objections)} example(s) cannot be trained on, the first of them:\n  {listed}")
    return source


def heldout_data(config: Config) -> DataConfig:
    """eval.data, or the training data's held-out split under eval.seed."""
    if config.eval.data is not None:
        return config.eval.data
    return heldout(config.data, seed=config.eval.seed, size=config.eval.problems)


def engine_clients(config: Config) -> list[EngineClient]:
    """A client of each engine, for one event loop. ValueError when there is no engine, or no key where one is named."""
    engine = config.rollout.engine
    if not engine.urls:
        raise ValueError("rollout.engine.urls is empty: start through `megatron-rl rl`, which starts an engine, "
                         "or give the URLs of running SGLang servers")
    key = engine_key(engine)
    return [EngineClient(url, timeout_s=config.rollout.request_timeout_s, control_timeout_s=engine.control_timeout_s,
                         api_key=key) for url in engine.urls]


def build_fleet(config: Config) -> Fleet:
    """With the router's choice of engine, if there is one, or our own."""
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
    """The engines of a run, spoken to on an event loop in the background. `with Serving(config) as serving:`"""

    def __init__(self, config: Config):
        self.fleet = build_fleet(config)
        self.background = EventLoopThread()

    def __enter__(self) -> Serving:
        self.background.__enter__()
        self.background.run(self.fleet.start())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.background.cancel_all()  # requests are aborted at the engines over connections that are still open
        self.background.run(self.fleet.close())
        self.background.__exit__(*exc_info)

    def tell(self, note: Callable[..., None], *args: Any) -> None:
        """Calls a method of the fleet on its own event loop."""

        async def call() -> None:
            note(*args)

        self.background.run(call())

    def responder(self, config: Config, tokenizer, rewards: RewardPool,
                  routed_layers: RoutedLayers | None = None) -> Responder:
        return Responder(self.fleet, config.rollout, tokenizer, rewards, seed=config.run.seed,
                         eos_token_id=tokenizer.eos_token_id, routed_layers=routed_layers)


def build_collector(config: Config, responder: Responder, prompts: Prompts) -> Collector:
    """The collector that rollout.collector names."""
    rollout = config.rollout
    fill = BudgetFill(config.c3po, config.parallel.dp, rollout.max_response_tokens)
    shared = {"prompts_per_step": rollout.prompts_per_step}
    if rollout.collector == "budgeted":
        return BudgetedCollector(responder, prompts, fill, **shared, overprovision=rollout.overprovision,
                                 seed=config.run.seed)
    if rollout.collector == "partial":
        return PartialCollector(responder, prompts, **shared, budget_tokens=rollout.budget_tokens or fill.tokens,
                                slice_tokens=rollout.slice_tokens, retention_steps=rollout.retention_steps,
                                concurrency=rollout.concurrency)
    if rollout.collector == "async":
        return AheadCollector(responder, prompts, **shared, max_staleness=rollout.max_staleness,
                              last_step=config.run.steps - 1)
    return SyncCollector(responder, prompts, **shared)
