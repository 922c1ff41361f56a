"""Rehearsed steps of a small network against closed forms."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch.distributed as dist

from megatron_rl.config.load import build
from megatron_rl.config.lora import LoraConfig
from megatron_rl.model.slots import count_parameters
from megatron_rl.observe.flops import forward_flops
from megatron_rl.plan.memory import expected_microbatches, plan_stage
from megatron_rl.rehearsal.roofline import Rates, phase_seconds
from megatron_rl.rehearsal.standins import DISPATCHER, SEQUENCES, rows_of_experts
from megatron_rl.rehearsal.step import Workload, check_rehearsable, rehearse
from megatron_rl.rehearsal.timeline import elapsed
from megatron_rl.rehearsal.workload import full_microbatches
from tests.megatron_rl.rehearsal.tiny import NETWORK, WORKLOAD, rehearsed, tiny_config

OLD, TRAIN_STEP = "old log-probabilities", "megatron_rl/train_step/step.py"
STATE_OF_HOST = "(fork)"
"""megatron/core/tensor_parallel/random.py compares states of the host's generator, which are never on a device."""
LAYOUTS = {"ep2": ({"world_size": 4, "ep": 2}, [3]), "tp2_pp2": ({"world_size": 4, "tp": 2, "pp": 2}, [0, 1, 2, 3]),
           "cp2": ({"world_size": 2, "cp": 2}, [0, 1])}


@pytest.mark.parametrize("name", LAYOUTS)
def test_flops_of_the_ranks_of_one_replica_are_the_closed_form(name):
    """Exactly: matrix products, causal attention, the router and the head, over tensor, pipeline and context ranks."""
    parallel, ranks = LAYOUTS[name]
    found = [rehearsed(tiny_config(**parallel), rank) for rank in ranks]
    lengths = found[0]["microbatch"]["lengths"]
    assert sum(each["phases"][OLD]["flops"] for each in found) == forward_flops(dataclasses.asdict(NETWORK), lengths)
    elements = found[0]["parameters"]
    if name == "ep2":  # half of the experts
        whole = elements["split"] + elements["whole"] + 2 * elements["experts"]
        assert whole == count_parameters(NETWORK)[0]
    if name == "tp2_pp2":  # norms, routers and, with etp=1, experts are whole on both ranks of a stage
        assert sum(each["parameters"]["split"] for each in found) + sum(
            each["parameters"]["whole"] + each["parameters"]["experts"] for each in found[::2]
        ) == count_parameters(NETWORK)[0]
    assert not dist.is_initialized()


@pytest.mark.parametrize(("parallel", "reads"), [
    ({}, 0), ({"world_size": 2, "tp": 2}, 0), ({"world_size": 2, "cp": 2}, 0), ({"world_size": 4, "ep": 2}, 1)])
def test_backend_torch_calls_attention_once_a_layer_and_reads_nothing_in_it(parallel, reads):
    """But for the rows that expert-parallel ranks exchange, which the host must know: once a layer with experts."""
    config = tiny_config(**parallel)
    recorder = rehearse(config, NETWORK, 0, full_microbatches(config)).recorder
    calls = {phase: sum(count for each, count in recorder.operations.items()
                        if each.phase == phase and each.name == "torch_attn._varlen_attn") for phase in (OLD, "update")}
    assert calls == {OLD: NETWORK.num_hidden_layers, "update": NETWORK.num_hidden_layers}
    expected = {DISPATCHER: reads * NETWORK.num_moe_layers} if reads else {}
    found = {phase: {where: count for (each, where), count in recorder.host_reads.items()
                     if each == phase and not where.endswith(STATE_OF_HOST)} for phase in calls}
    assert found[OLD] == expected
    assert any(where.startswith(TRAIN_STEP) for where in found["update"])  # a micro-batch's tokens, before its layers
    assert {where: count for where, count in found["update"].items() if not where.startswith(TRAIN_STEP)} == expected


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=8), LoraConfig(rank=8, experts="shared_outer")],
                         ids=["all_weights", "adapters", "shared_adapters"])
def test_weights_gradients_and_optimiser_are_what_plan_says(lora):
    config = tiny_config(world_size=4, ep=2)
    found = rehearsed(dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora)))
    for kind in ("weights", "gradients"):
        assert found["plan"][kind]["rehearsed"] == found["plan"][kind]["plan"] > 0, kind
    counters = found["plan"]["optimiser"]["rehearsed"] - found["plan"]["optimiser"]["plan"]
    # Adam's count of each tensor's steps, 4 bytes, left out by plan
    assert counters in range(4, 4 * (128 if lora.on else 64), 4)


def test_states_on_the_host_come_over_the_bus_and_go_back():
    """12 bytes an element each way, at the bus's rate; nothing else crosses it."""
    config = tiny_config(world_size=4, ep=2)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, offload=True))
    recorder = rehearse(config, NETWORK, 0, WORKLOAD).recorder
    crossed = Counter()
    for each, count in recorder.operations.items():
        if each.over_bus:
            crossed[each.phase] += each.bytes * count
    states = plan_stage(NETWORK, config, 0, 1).host
    assert crossed == {"build optimiser": states, "optimiser step": 2 * states}
    rates = Rates(host=1.0)  # a byte a second
    assert phase_seconds(recorder, rates)["optimiser step"]["host"] == 2 * states
    assert elapsed([each for each in recorder.events if each.phase == "optimiser step"], rates) > 2 * states


def test_a_rehearsal_repeats_bit_for_bit():
    config = tiny_config(world_size=2, ep=2)
    assert rehearsed(config) == rehearsed(config)


@pytest.mark.parametrize(("algo", "reads"), [
    ({"loss": {"surrogate": "gspo"}}, 1), ({"loss": {"surrogate": "lpo"}}, 1),
    ({"sequence_ratio_low": 0.5, "sequence_ratio_high": 2.0, "sequence_min_token_ratio": 0.1}, 2)])
def test_an_objective_over_sequences_reads_their_number_once_for_each_reduction(algo, reads):
    config = tiny_config()
    options = build({"algo": algo}).algo
    found = rehearse(dataclasses.replace(config, algo=options), NETWORK, 0, WORKLOAD).recorder
    assert found.host_reads["update", SEQUENCES] == reads


def test_what_has_no_stand_in_is_refused_by_name():
    config = tiny_config(world_size=2, ep=2, token_dispatcher="allgather")
    with pytest.raises(ValueError, match=r"parallel\.token_dispatcher=allgather"):
        check_rehearsable(config)
    routed = tiny_config(world_size=2)
    routed = dataclasses.replace(routed, algo=dataclasses.replace(routed.algo, router_replay="rollout"))
    with pytest.raises(ValueError, match=r"algo\.router_replay=rollout"):
        check_rehearsable(routed)
    taught = build({"algo": {"distillation": {"teachers": {"big": {"checkpoint": "/big"}}}}})
    with pytest.raises(ValueError, match=r"algo\.distillation\.teachers\.big\.checkpoint=/big"):
        check_rehearsable(taught)


def test_the_rehearsed_micro_batches_are_full_and_fill_the_pipeline():
    config = tiny_config(world_size=2)
    expected = expected_microbatches(config)
    assert full_microbatches(config) == Workload((32, 32, 32), 1, expected)  # 96 tokens, sequences of 64 / 2
    assert full_microbatches(tiny_config(world_size=2, cp=2)).lengths == (32,) * 6
    assert full_microbatches(tiny_config(world_size=2, pp=2)).microbatches == 2


def test_uneven_experts_give_this_rank_more_rows():
    """tokens x choices = 192 rows of each of 2 ranks over 8 experts: 4 experts have 192 of 384, or 1.5 times that."""
    assert rows_of_experts(192, 8, range(4, 8), 1.5) == [12] * 4 + [36] * 4
    assert rows_of_experts(192, 8, range(4, 8), 1.0) == rows_of_experts(192, 8, range(8), 1.5) == [24] * 8
    config = tiny_config(world_size=4, ep=2)
    even, uneven = rehearsed(config, 1), rehearsed(config, 1, imbalance=1.5)
    expert_row = 6 * NETWORK.hidden_size * NETWORK.moe_intermediate_size  # three matrices, 2 FLOPs each
    assert uneven["phases"][OLD]["flops"] - even["phases"][OLD]["flops"] == 96 * expert_row
    assert uneven["peak"]["bytes"] > even["peak"]["bytes"]
    with pytest.raises(ValueError, match=r"--imbalance 3: between 1 .even experts. and parallel\.ep=2"):
        rehearsed(config, 1, imbalance=3.0)
