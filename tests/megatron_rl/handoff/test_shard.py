"""Shards hold every sequence of a step once, as it was cut, and little else."""

import dataclasses

import numpy as np
import pytest

from megatron_rl.batch import assemble, pack, packed_tokens
from megatron_rl.config.load import build
from megatron_rl.handoff import cut_into_shards, read_shard, write_shard
from megatron_rl.model.network import Network
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score, VersionSpan

NETWORK = dataclasses.asdict(Network("bailing_moe", *[1] * 14, norm_topk_prob=True))
LAYERS, TOP_K = 3, 2


def groups(count: int, *, longest: int, experts: bool, seed: int = 0) -> list[RolloutGroup]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        rollouts = []
        for _ in range(4):
            prompt, length = int(rng.integers(1, 6)), int(rng.integers(1, longest))
            total = prompt + length
            rollouts.append(Rollout(
                rng.integers(0, 50_000, total).astype(np.int32), np.arange(total) >= prompt,
                rng.normal(size=total).astype(np.float32), Finish.STOP, (VersionSpan(0, 0, length),),
                rng.integers(0, 256, (total - 1, LAYERS, TOP_K), dtype=np.uint8) if experts else None))
        scores = tuple(Score(float(value), "correct") for value in rng.integers(0, 2, 4))
        made.append(RolloutGroup(Prompt(str(number), (1,), "", "", "math"), tuple(rollouts), ("",) * 4, scores))
    return made


def config(**changes):
    raw = {"algo": {"phi": 200, "updates_per_rollout": 2}, "batch": {"tokens_per_microbatch": 128},
           "parallel": {"world_size": 4}}
    for section, values in changes.items():
        raw[section] = raw.get(section, {}) | values
    return build(raw)


def batches_of(options, made, step=0):
    return assemble(made, options.algo, dp=options.parallel.dp, seed=0, step=step,
                    max_response_tokens=options.rollout.max_response_tokens)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("parallel", [{"world_size": 1}, {"world_size": 4}, {"world_size": 4, "cp": 2},
                                      {"world_size": 4, "tp": 2, "token_dispatcher": "allgather"}])
def test_all_ranks_together_hold_each_kept_token_once_and_pack_what_was_cut(parallel, experts):
    options = config(parallel=parallel)
    batches = batches_of(options, groups(12, longest=40, experts=experts))
    shards = [read_shard(write_shard(mine)) for mine in cut_into_shards(batches, options, NETWORK)]
    assert len(shards) == options.parallel.dp
    for update, batch in enumerate(batches):
        mine = [shard[update] for shard in shards]
        dealt = {sample.index: sample for each in mine for sample in each.samples}
        assert sorted(dealt) == sorted(sample.index for sample in batch.samples)
        for sample in batch.samples:
            packed = [pack([each], multiple_of=1, experts_shape=(LAYERS, TOP_K) if experts else None)
                      for each in (sample, dealt[sample.index])]
            for name in ("input_ids", "labels", "loss_mask", "advantages", "rollout_logprobs", "response_lengths"):
                one, other = (getattr(each, name) for each in packed)
                assert one.dtype == other.dtype and one.equal(other), name
            assert not experts or packed[0].routed_experts.equal(packed[1].routed_experts)
        kept = sum(int(sample.loss_mask.sum()) for sample in dealt.values())
        assert all(each.selected_tokens == batch.selection.selected_tokens == kept for each in mine)
        assert {(each.phi, each.num_responses, len(each.sizes)) for each in mine} == {
            (batch.selection.phi, batch.num_responses, len(mine[0].sizes))}
        for each in mine:
            assert sum(each.sizes) == len(each.samples) and len(each.microbatches()) == len(each.least_tokens)


def test_under_allgather_every_rank_is_told_the_longest_of_each_micro_batch():
    options = config(parallel={"world_size": 3, "token_dispatcher": "allgather"}, batch={"tokens_per_microbatch": 64})
    [*shards] = cut_into_shards(batches_of(options, groups(12, longest=40, experts=False)), options, NETWORK)
    for update in range(2):
        rows = zip(*(shard[update].microbatches() for shard in shards), strict=True)
        needed = [max(packed_tokens([len(sample.token_ids) - 1 for sample in members], multiple_of=1)
                      for members in row) for row in rows]
        assert [list(shard[update].least_tokens) for shard in shards] == [needed] * 3
        assert len(set(needed)) > 1


@pytest.mark.parametrize("experts", [False, True])
def test_a_shard_is_hardly_more_than_what_its_rank_trains_on(experts):
    """At most 1.1 times the bytes of token ids, mask, log-probabilities and experts (the goal of the handoff)."""
    options = config(algo={"phi": 20_000}, batch={"tokens_per_microbatch": 1024})
    shards = cut_into_shards(batches_of(options, groups(40, longest=900, experts=experts)), options, NETWORK)
    assert len(shards) == options.parallel.dp
    for shard in shards:
        tokens = sum(len(sample.token_ids) for update in shard for sample in update.samples)
        assert len(write_shard(shard)) <= 1.1 * tokens * (4 + 1 + 4 + experts * LAYERS * TOP_K)


def test_ranks_may_be_left_with_padding_alone():
    options = config(algo={"phi": 3, "updates_per_rollout": 1})
    shards = cut_into_shards(batches_of(options, groups(1, longest=9, experts=True)), options, NETWORK)
    found = [read_shard(write_shard(shard)) for shard in shards]
    assert sorted(len(update.samples) for [update] in found)[0] == 0
    assert all(update.sizes == shard[0].sizes for [update], shard in zip(found, shards, strict=True))
