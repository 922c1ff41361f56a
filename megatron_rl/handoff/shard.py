"""What one data-parallel rank trains on in one step of the loop: its sequences end to end, and how to pack them.

The orchestrator cuts the step's batches into shards. A rank reads its own shard and only has to pack it. Letters: S
sequences of this shard, in the order in which their micro-batches run; L tokens of one of them; N the tokens of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rl.batch import StepBatch, common_tokens, plan_microbatches
from megatron_rl.config.schema import Config
from megatron_rl.handoff.body import dump, load
from megatron_rl.observe.flops import attention_balance_tokens
from megatron_rl.types import TrainSample


@dataclass(frozen=True)
class UpdateShard:
    """A data-parallel rank's share of one optimiser step.

    - samples: its sequences.
    - sizes: how many of them each micro-batch takes, in order. Every rank has equally many micro-batches.
    - least_tokens: each micro-batch is padded to at least this many tokens, per rank.
    - phi, selected_tokens, num_responses: totals of the whole optimiser step (StepBatch).
    """

    samples: tuple[TrainSample, ...]
    sizes: tuple[int, ...]
    least_tokens: tuple[int, ...]
    phi: int
    selected_tokens: int
    num_responses: int

    def microbatches(self) -> list[tuple[TrainSample, ...]]:
        ends = np.cumsum(self.sizes, dtype=int)
        return [self.samples[end - size:end] for end, size in zip(ends, self.sizes, strict=True)]


def schedule(lengths: Sequence[int], config: Config,
             network: Mapping[str, Any]) -> tuple[list[list[list[int]]], list[int]]:
    """(the micro-batches of every data-parallel rank as places in `lengths`, the least padded length of each).

    lengths: positions of each sequence. network: the fields of model.network.Network.
    """
    parallel = config.parallel
    plan = plan_microbatches(
        lengths, dp_size=parallel.dp, cp_size=parallel.cp, tokens_per_microbatch=config.batch.tokens_per_microbatch,
        align=parallel.token_multiple, multiple_of=parallel.pp if parallel.vpp else 1,
        attention_tokens=attention_balance_tokens(network))
    if parallel.token_dispatcher != "allgather":
        return plan, [0] * len(plan[0])
    return plan, common_tokens(plan, lengths, multiple_of=parallel.token_multiple, cp_size=parallel.cp)


def cut_into_shards(batches: Sequence[StepBatch], config: Config,
                    network: Mapping[str, Any]) -> list[list[UpdateShard]]:
    """By data-parallel rank: its share of every optimiser step, in order."""
    shards: list[list[UpdateShard]] = [[] for _ in range(config.parallel.dp)]
    for batch in batches:
        plan, least = schedule([len(sample.token_ids) - 1 for sample in batch.samples], config, network)
        for mine, microbatches in zip(shards, plan, strict=True):
            mine.append(UpdateShard(
                tuple(batch.samples[place] for members in microbatches for place in members),
                tuple(map(len, microbatches)), tuple(least), batch.selection.phi, batch.selection.selected_tokens,
                batch.num_responses))
    return shards


def write_shard(updates: Sequence[UpdateShard]) -> bytes:
    """The safetensors body of one rank's updates."""
    return dump([_to_arrays(update) for update in updates])


def read_shard(body: bytes) -> list[UpdateShard]:
    """The inverse of write_shard."""
    return [_from_arrays(each) for each in load(body)]


def _to_arrays(update: UpdateShard) -> dict[str, Any]:
    samples = update.samples

    def end_to_end(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype, casting="same_kind")

    def of_all(name: str) -> np.ndarray | None:
        found = [getattr(sample, name) for sample in samples if getattr(sample, name) is not None]
        assert len(found) in (0, len(samples)), f"either all responses of a step have {name} or none"
        return np.concatenate(found) if found else None

    def where_said(name: str, fill: float) -> np.ndarray | None:
        """All samples, with `fill` in those that no teacher on a server has judged."""
        said = next((getattr(sample, name) for sample in samples if getattr(sample, name) is not None), None)
        return None if said is None else np.concatenate([
            np.full((len(sample.token_ids), *said.shape[1:]), fill, said.dtype) if getattr(sample, name) is None
            else getattr(sample, name) for sample in samples])

    return {
        "token_ids": end_to_end([sample.token_ids for sample in samples], np.int32),
        "loss_mask": end_to_end([sample.loss_mask for sample in samples], np.bool_),
        "rollout_logprobs": end_to_end([sample.rollout_logprobs for sample in samples], np.float32),
        "routed_experts": of_all("routed_experts"), "sentences": of_all("sentences"),
        "lengths": np.array([len(sample.token_ids) for sample in samples], dtype=np.int32),
        "indices": np.array([sample.index for sample in samples], dtype=np.int32),
        "teachers": np.array([sample.teacher for sample in samples], dtype=np.int32),
        "teacher_logprobs": where_said("teacher_logprobs", np.nan), "teacher_ids": where_said("teacher_ids", 0),
        "advantages": np.array([sample.advantage for sample in samples], dtype=np.float64),
        "response_tokens": np.array([sample.num_response_tokens for sample in samples], dtype=np.int32),
        "sizes": list(update.sizes), "least_tokens": list(update.least_tokens), "phi": update.phi,
        "selected_tokens": update.selected_tokens, "num_responses": update.num_responses}


def _from_arrays(arrays: Mapping[str, Any]) -> UpdateShard:
    ends = np.cumsum(arrays["lengths"], dtype=int)
    samples = []
    for place, (end, length) in enumerate(zip(ends, arrays["lengths"], strict=True)):
        here, experts, sentences = slice(end - length, end), arrays["routed_experts"], arrays["sentences"]
        taught, taught_ids = arrays["teacher_logprobs"], arrays["teacher_ids"]
        samples.append(TrainSample(
            index=int(arrays["indices"][place]), token_ids=arrays["token_ids"][here],
            loss_mask=arrays["loss_mask"][here], rollout_logprobs=arrays["rollout_logprobs"][here],
            advantage=float(arrays["advantages"][place]), num_response_tokens=int(arrays["response_tokens"][place]),
            routed_experts=None if experts is None else experts[end - length - place:end - place - 1],
            sentences=None if sentences is None else sentences[here], teacher=int(arrays["teachers"][place]),
            teacher_logprobs=None if taught is None else taught[here],
            teacher_ids=None if taught_ids is None else taught_ids[here]))
    return UpdateShard(tuple(samples), tuple(arrays["sizes"]), tuple(arrays["least_tokens"]), arrays["phi"],
                       arrays["selected_tokens"], arrays["num_responses"])
