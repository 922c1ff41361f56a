"""Rules that need more than one section, or the network's sizes; and the summary that `--check` prints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rl.config.rules import require
from megatron_rl.config.schema import Config, ParallelConfig


@dataclass(frozen=True)
class Sizes:
    """What the rules below need to know of the network (from its config.json)."""

    max_position_embeddings: int
    total_parameters: int
    active_parameters: int


def check_rl(config: Config, sizes: Sizes | None) -> None:
    """Raise ValueError naming the keys of the first rule that does not hold. sizes None: no checkpoint at hand."""
    algo, rollout, batch, parallel = config.algo, config.rollout, config.batch, config.parallel
    require(not (algo.needs_whole_sequences and parallel.cp > 1),
            f"parallel.cp={parallel.cp} spreads a sequence over ranks, but algo.loss.surrogate=gspo or lpo "
            "and algo.sequence_* need its tokens on one; use parallel.cp=1, or a surrogate and a correction per token")
    require(batch.tokens_per_microbatch % parallel.token_multiple == 0,
            f"batch.tokens_per_microbatch={batch.tokens_per_microbatch} must be a multiple of "
            f"{parallel.token_multiple}, to which parallel.tp={parallel.tp} and parallel.cp={parallel.cp} pad")
    _check_kernels(config)
    over_cp = f" x parallel.cp={parallel.cp}" if parallel.cp > 1 else ""
    require(rollout.max_context_tokens <= batch.tokens_per_microbatch * parallel.cp,
            f"batch.tokens_per_microbatch={batch.tokens_per_microbatch}{over_cp} is less than one sequence may have "
            f"(rollout.max_context_tokens={rollout.max_context_tokens})")
    if sizes is not None:
        require(rollout.max_context_tokens <= sizes.max_position_embeddings,
                f"rollout.max_context_tokens={rollout.max_context_tokens} exceeds the model's "
                f"max_position_embeddings={sizes.max_position_embeddings}")
    require(rollout.responses_per_prompt > 1,
            "rollout.responses_per_prompt=1: a group-relative advantage needs at least 2 responses per prompt")
    require(algo.truncated != "overlong_penalty" or algo.overlong_buffer_tokens <= rollout.max_response_tokens,
            f"algo.overlong_buffer_tokens={algo.overlong_buffer_tokens} is more than a response may have "
            f"(rollout.max_response_tokens={rollout.max_response_tokens})")
    require(not rollout.pass_rate.enabled or config.data.shuffle,
            "data.shuffle=false is not read with rollout.pass_rate.enabled=true, which draws by chance: leave one out")
    require(algo.distillation.task_reward or not config.reward.shaping,
            "reward.shaping with algo.distillation.task_reward=false, which trains on no reward: leave one out")
    asked = [name for name, teacher in algo.distillation.teachers.items() if teacher.urls]
    require(not asked or rollout.temperature == 1.0,
            f"rollout.temperature={rollout.temperature}: servers score at temperature 1, so algo.distillation.teachers."
            f"{', '.join(asked)} would judge another distribution than the one that samples; use "
            "rollout.temperature=1.0, or a teacher's checkpoint")
    if algo.has_budget:
        _check_budget(config)
    _check_collector(config)
    require(not (rollout.engine.router and algo.router_replay == "rollout"),
            "rollout.engine.router drops the wish for routed experts from requests, which algo.router_replay=rollout "
            "needs; leave the router unset or use algo.router_replay=trainer")
    require(not (algo.corrects_mismatch and rollout.top_p < 1.0),
            "rollout.top_p < 1 changes the sampled distribution but not the reported log-probabilities, so "
            "algo.mismatch and algo.sequence_* cannot correct for it; use rollout.top_p=1.0")


def check_sft(config: Config, sizes: Sizes | None) -> None:
    """As check_rl, for supervised fine-tuning."""
    batch, parallel = config.batch, config.parallel
    require(batch.tokens_per_microbatch % parallel.token_multiple == 0,
            f"batch.tokens_per_microbatch={batch.tokens_per_microbatch} must be a multiple of "
            f"{parallel.token_multiple}, to which parallel.tp={parallel.tp} and parallel.cp={parallel.cp} pad")
    _check_kernels(config)
    if sizes is not None:
        require(config.rollout.max_context_tokens <= sizes.max_position_embeddings,
                f"rollout.max_context_tokens={config.rollout.max_context_tokens} exceeds the model's "
                f"max_position_embeddings={sizes.max_position_embeddings}")
    for key in ("weights", "curriculum"):
        require(not getattr(config.data, key),
                f"data.{key} is not read by SFT, which trains on the first sft.examples, in the ratio of the sections' "
                "sizes, in a new order every epoch: leave it out")
    require(config.data.shuffle,
            "data.shuffle=false is not read by SFT, which has a new order every epoch: leave it out")


def check_evaluates(config: Config, who: str) -> None:
    """ValueError if nothing is evaluated, which `who` needs."""
    require(bool(config.eval.problems or config.eval.benchmarks),
            f"eval.problems=0 without eval.benchmarks evaluates nothing, but {who} needs evaluations: set one of them")


def check_served_alone(config: Config) -> None:
    """ValueError if engines are to serve model.path, no trainer publishes to them, and adapters stand beside it."""
    path = config.model.lora.path
    require(path is None, f"model.lora.path={path}: engines would serve model.path without it; merge the two with "
            "`megatron-rl convert merge`, and give the result as model.path")


def check_gloo(parallel: ParallelConfig) -> None:
    """ValueError if expert-tensor-parallel ranks would gather different numbers of rows, which gloo cannot do."""
    uneven = parallel.etp > 1 and (parallel.ep > 1 or parallel.tp * parallel.cp % parallel.etp > 0)
    require(not uneven or parallel.token_dispatcher != "alltoall",
            f"parallel.etp={parallel.etp} with parallel.tp={parallel.tp}, cp={parallel.cp}, ep={parallel.ep}: ranks "
            "gather different numbers of rows, which needs GPUs (NCCL); here use parallel.etp=1 or "
            "parallel.token_dispatcher=allgather")


def _check_kernels(config: Config) -> None:
    logprob, tp = config.model.kernels.logprob, config.parallel.tp
    require(tp == 1 or logprob not in ("liger", "reference"),
            f"model.kernels.logprob={logprob} knows the whole head only, which parallel.tp={tp} cuts; use chunked or "
            "triton")
    require(config.model.fp32_lm_head or logprob not in ("liger", "triton", "fused"),
            f"model.fp32_lm_head=false with model.kernels.logprob={logprob}, which does not round logits; use chunked")


def _check_collector(config: Config) -> None:
    algo, rollout = config.algo, config.rollout
    if rollout.collector == "budgeted":
        require(algo.has_budget, f"rollout.collector=budgeted generates what algo.phi needs, which "
                f"algo.objective={algo.objective} does not have; use rollout.collector=sync")
        require(algo.order == "groups", "rollout.collector=budgeted needs algo.order=groups: the reward of every "
                "response of a group is needed for its advantages, so whole groups must come first in the order")
    stale = (rollout.collector == "async" and rollout.max_staleness > 0) or rollout.collector == "partial"
    require(not stale or algo.corrects_mismatch,
            f"rollout.collector={rollout.collector} trains on tokens of older weights (rollout.max_staleness, "
            "rollout.retention_steps), which must be corrected for: set algo.mismatch=tis, icepop or kpop, or one "
            "of algo.sequence_*")


def _check_budget(config: Config) -> None:
    algo, rollout, dp = config.algo, config.rollout, config.parallel.dp
    phi = algo.phi_global(dp)
    require(algo.cutoff == "token" or phi >= rollout.max_response_tokens,
            f"algo.phi={algo.phi} ({phi} over the cluster) is smaller than one response may be "
            f"(rollout.max_response_tokens={rollout.max_response_tokens}); with algo.cutoff=response it cannot be "
            "met: raise algo.phi or use algo.cutoff=token")
    if algo.underfull == "train_short":
        return
    rounds = algo.max_collect_rounds if algo.underfull == "collect_more" else 1
    needed = phi * algo.updates_per_rollout
    if rollout.collector == "partial":  # prompts_per_step is how many groups are open at a time
        sampled = rollout.budget_tokens or needed
        require(sampled * rounds >= needed,
                f"rollout.budget_tokens={sampled} in {rounds} round(s) of a step can never meet algo.phi: {needed} "
                "response tokens per rollout; raise rollout.budget_tokens or lower algo.phi")
        return
    responses = rollout.prompts_per_step * rollout.responses_per_prompt
    require(responses * rollout.max_response_tokens * rounds >= needed,
            f"algo.phi: {needed} response tokens per rollout can never be met by {responses} responses of at most "
            f"{rollout.max_response_tokens} tokens in {rounds} round(s); raise rollout.prompts_per_step or lower "
            "algo.phi")


def sft_summary(config: Config, sizes: Sizes) -> list[tuple[str, str]]:
    """(name, value) rows: what supervised fine-tuning resolves to."""
    sft, options = config.sft, config.optimizer
    model, ranks, experts = [row for row in summary(config, sizes) if row[0] in ("model", "ranks", "experts")]
    schedule = f"{options.schedule} over {sft.schedule_steps} steps"
    return [model, ranks, experts,
            ("examples", f"{sft.examples:,} x {sft.epochs} epochs, {sft.batch_size} a step: {sft.total_steps:,} steps"),
            ("sequence", f"up to {config.batch.tokens_per_microbatch * config.parallel.cp:,} tokens"),
            ("optimiser", f"AdamW lr {options.lr:g} {schedule}, weight decay {options.weight_decay:g}")]


def summary(config: Config, sizes: Sizes | None) -> list[tuple[str, str]]:
    """(name, value) rows: the layout that this configuration resolves to."""
    parallel, algo, rollout = config.parallel, config.algo, config.rollout
    dp, phi = parallel.dp, algo.phi_global(parallel.dp)
    responses = rollout.prompts_per_step * rollout.responses_per_prompt
    prompt_room = rollout.max_context_tokens - rollout.max_response_tokens
    expert_dp = parallel.world_size // (parallel.ep * parallel.etp * parallel.pp)
    least = math.ceil(phi / dp / (config.batch.tokens_per_microbatch * parallel.cp))
    rows = [
        ("ranks", f"{parallel.world_size} = tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {dp}"),
        ("experts", f"ep {parallel.ep} x etp {parallel.etp} x pp {parallel.pp} x expert-dp {expert_dp}"),
        ("rollout", f"{rollout.prompts_per_step} prompts x {rollout.responses_per_prompt} = {responses} responses,"
                    f" up to {rollout.max_response_tokens} tokens after prompts of up to {prompt_room}"),
        ("objective", f"{algo.objective}, surrogate {algo.loss.surrogate}, mismatch {algo.mismatch}"),
        ("Phi", f"{phi:,} response tokens per optimiser step over the cluster, {phi / dp:,.0f} per data-parallel rank"
                f" (algo.scope={algo.scope}, cutoff={algo.cutoff})" if algo.has_budget else
                f"none: every response token trains (algo.objective={algo.objective})"),
        ("optimiser steps per rollout", str(algo.updates_per_rollout)),
        ("micro-batches", f"at least {least} per rank and step, of at most "
                          f"{config.batch.tokens_per_microbatch:,} tokens on a rank"),
        ("losses", f"clip {algo.loss.clip_eps_low}/{algo.loss.clip_eps_high}, KL {algo.loss.kl_coef} "
                   f"({algo.loss.kl_estimator}), entropy {algo.loss.entropy_coef}, balance {algo.balance_coef}, "
                   f"z {algo.z_loss_coef}"),
        ("optimiser", f"AdamW lr {config.optimizer.lr:g} {config.optimizer.schedule}, "
                      f"distributed={parallel.distributed_optimizer}"),
    ]
    if sizes is not None:
        rows.insert(0, ("model", f"{_count(sizes.total_parameters)} parameters, {_count(sizes.active_parameters)} "
                                 f"active per token, {config.model.dtype}"))
    return rows


def _count(number: int) -> str:
    """16.80B, 0.63M."""
    return f"{number / 1e9:.2f}B" if number >= 1e8 else f"{number / 1e6:.2f}M"
