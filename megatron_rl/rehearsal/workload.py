"""Which micro-batches a rank rehearses, and how many of them a step is worth."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_rl.batch import BudgetFill
from megatron_rl.config.schema import Config
from megatron_rl.handoff import schedule
from megatron_rl.model.network import Network
from megatron_rl.observe.flops import attention_balance_tokens
from megatron_rl.plan.activations import chunks_in_flight
from megatron_rl.plan.memory import expected_microbatches
from megatron_rl.rehearsal.ranks import coordinates
from megatron_rl.rehearsal.records import Lengths
from megatron_rl.rehearsal.standins import shares
from megatron_rl.rehearsal.step import Workload


def workload_of(config: Config, network: Network, rank: int, lengths: Lengths | None) -> Workload:
    return full_microbatches(config) if lengths is None else scheduled_microbatches(config, network, rank, lengths)


def full_microbatches(config: Config) -> Workload:
    """Micro-batches at their cap, of sequences of the mean length that `plan` expects; as many as fill the pipeline.

    A sequence has half the prompt's room and half of the longest response.
    """
    rollout, parallel = config.rollout, config.parallel
    room = config.batch.tokens_per_microbatch * parallel.cp
    mean = rollout.max_context_tokens / 2
    lengths = shares(room, max(1, round(room / mean)))
    if parallel.cp > 1:
        unit = 2 * parallel.cp
        lengths = [length // unit * unit for length in lengths]
    expected = expected_microbatches(config)
    return Workload(tuple(lengths), _filling(config, expected), expected)


def scheduled_microbatches(config: Config, network: Network, rank: int, lengths: Lengths) -> Workload:
    """The fullest micro-batch that the run's own schedule gives this rank, and what its whole share is worth in it.

    The responses of one optimiser step (with a budget about Phi tokens, without one its share of the rollout), each
    behind a prompt of half the prompt's room, go through handoff.schedule over all data-parallel ranks. Worth is the
    schedule's own cost, L (1 + L / attention_tokens) of each sequence.
    """
    rollout, parallel, sizes = config.rollout, config.parallel, dataclasses.asdict(network)
    prompt = (rollout.max_context_tokens - rollout.max_response_tokens) // 2
    drawn = lengths.draw(responses_per_update(config, lengths), rollout.max_response_tokens)
    sequences = (drawn + prompt).tolist()
    plan, _ = schedule(sequences, config, sizes)
    mine = [[sequences[place] for place in members]
            for members in plan[coordinates(rank, parallel).dp] if members]
    fullest = max(mine, key=sum)
    attention = attention_balance_tokens(sizes)

    def cost(members: list[int]) -> float:
        return sum(length * (1 + length / attention) for length in members)

    unit = 2 * parallel.cp if parallel.cp > 1 else 1
    return Workload(tuple(max(unit, length // unit * unit) for length in fullest), _filling(config, len(mine)),
                    sum(map(cost, mine)) / cost(fullest))


def responses_per_update(config: Config, lengths: Lengths) -> int:
    """Responses that one optimiser step trains on, at least one for each data-parallel rank."""
    return max(config.parallel.dp, round(tokens_per_update(config, lengths) / _mean(config, lengths)))


def tokens_per_update(config: Config, lengths: Lengths) -> int:
    """Response tokens that one optimiser step trains on: Phi, or without a budget its share of the rollout."""
    algo, rollout = config.algo, config.rollout
    if algo.has_budget:
        return BudgetFill(algo, config.parallel.dp, rollout.max_response_tokens).phi
    responses = rollout.prompts_per_step * rollout.responses_per_prompt / algo.updates_per_rollout
    return round(responses * _mean(config, lengths))


def _mean(config: Config, lengths: Lengths) -> float:
    return float(np.mean(lengths.draw(4096, config.rollout.max_response_tokens)))


def _filling(config: Config, microbatches: int) -> int:
    """How many micro-batches fill the pipeline. microbatches: how many a step has."""
    parallel = config.parallel
    if parallel.pp == 1:
        return 1
    step = parallel.pp if parallel.vpp else 1
    fill = chunks_in_flight(parallel, 0, microbatches)
    return -(-fill // ((parallel.vpp or 1) * step)) * step
