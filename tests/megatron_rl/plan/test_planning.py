"""The plan's arithmetic by hand, and the documented examples; against real policies: tests/distributed/test_plan.py."""

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.config.distillation import DistillationConfig, TeacherConfig
from megatron_rl.config.load import load
from megatron_rl.config.schema import ParallelConfig
from megatron_rl.model.architectures import HF_FILES
from megatron_rl.model.slots import count_parameters
from megatron_rl.plan import Hardware, plan_memory, propose, stage_chunks
from megatron_rl.plan.activations import chunks_in_flight
from megatron_rl.plan.layouts import estimate, microbatch_flops, variants
from megatron_rl.plan.memory import expected_microbatches, padded
from megatron_rl.preflight import network_of

PAGE = Path(__file__).resolve().parents[3] / "docs" / "planning.md"


@pytest.fixture(scope="module")
def ring_lite():
    return load(["experiment=ring_lite_rl_stage1", "parallel.world_size=8"])


@pytest.fixture(scope="module")
def ling_lite(ring_lite):
    return network_of(ring_lite)


@pytest.mark.parametrize(("pp", "vpp"), [(1, None), (4, None), (2, 7)])
def test_stages_together_hold_every_parameter_once(ling_lite, pp, vpp):
    parallel = ParallelConfig(world_size=pp, pp=pp, vpp=vpp)
    held = sum(chunk.num_parameters for stage in range(pp) for chunk in stage_chunks(ling_lite, parallel, stage))
    assert held == count_parameters(ling_lite)[0]


def test_a_tied_head_is_held_again_by_the_last_stage(ling_lite):
    tied = dataclasses.replace(ling_lite, model_type="qwen3_moe", qk_norm=True, num_shared_experts=0,
                               tie_word_embeddings=True)
    parallel = ParallelConfig(world_size=2, pp=2)
    held = sum(chunk.num_parameters for stage in range(2) for chunk in stage_chunks(tied, parallel, stage))
    assert held == count_parameters(tied)[0] + tied.vocab_size * tied.hidden_size


def test_buffers_are_padded_as_the_distributed_optimiser_pads_them():
    # 100 -> 128, 64 -> 64, 1 -> 64: 256; a multiple of lcm(6, 128) = 384
    assert padded((100, 64, 1), 6) == 384
    assert padded((100, 64, 1), 2) == 256


def test_micro_batches_in_flight_by_hand():
    # 1F1B on 4 stages: the first has sent out 4 before its first backward, the last 1; no more than there are
    assert [chunks_in_flight(ParallelConfig(world_size=4, pp=4), stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert chunks_in_flight(ParallelConfig(world_size=4, pp=4), 0, 2) == 2
    # interleaved, 2 chunks on 2 stages: (2 - 1) * 2 + (2 - 1) * 2 warm-up passes and one more
    assert chunks_in_flight(ParallelConfig(world_size=2, pp=2, vpp=2), 0, 8) == 5


def test_ling_lite_in_bfloat16_by_hand(ling_lite, ring_lite):
    """One rank with everything: 16.8B parameters at 2 bytes, gradients at 4, moments and main weights at 12."""
    total = count_parameters(ling_lite)[0]
    alone = dataclasses.replace(ring_lite, parallel=ParallelConfig(distributed_optimizer=False))
    plan = plan_memory(ling_lite, alone)
    assert (plan.weights, plan.gradients, plan.optimizer, plan.reference) == (
        2 * total, 4 * total, 12 * total, 2 * total)


def test_a_teacher_that_the_ranks_hold_takes_what_a_reference_of_its_size_takes(ling_lite, ring_lite, tmp_path):
    shutil.copy(HF_FILES / "ling_lite.json", tmp_path / "config.json")
    loss = dataclasses.replace(ring_lite.algo.loss, kl_coef=0.0)
    teachers = DistillationConfig({"a": TeacherConfig(checkpoint=str(tmp_path)), "b": TeacherConfig(urls=("http://x",))},
                                  {"math": "a", "code": "b"})
    plans = [plan_memory(ling_lite, dataclasses.replace(ring_lite, algo=dataclasses.replace(
        ring_lite.algo, loss=loss, distillation=each))) for each in (DistillationConfig(), teachers)]
    assert [plan.reference for plan in plans] == [0, plans[0].weights]


def test_recompute_keeps_less_and_longer_micro_batches_keep_more(ling_lite, ring_lite):
    def activations(**changes):
        return plan_memory(ling_lite, dataclasses.replace(ring_lite, **changes)).activations

    whole = activations(model=dataclasses.replace(ring_lite.model, recompute="none"))
    assert whole > 10 * activations()
    doubled = dataclasses.replace(ring_lite.batch, tokens_per_microbatch=2 * ring_lite.batch.tokens_per_microbatch)
    assert activations(batch=doubled) == pytest.approx(2 * activations(), rel=1e-6)


def test_proposals_fit_are_ordered_and_train_the_same_phi(ling_lite, ring_lite):
    hardware = Hardware()
    proposals = propose(ling_lite, ring_lite, hardware)
    assert all(each.memory.total <= hardware.usable for each in proposals)
    assert [each.seconds for each in proposals] == sorted(each.seconds for each in proposals)
    # phi is 8 x 204,800 tokens whatever the layout's dp, and micro-batches hold at most 24,576 on a rank
    for each in proposals:
        assert each.memory.num_microbatches * each.parallel.dp * each.parallel.cp * 24_576 >= 8 * 204_800


def test_proposals_keep_to_the_rules_of_the_objective(ling_lite, ring_lite):
    """gspo needs all tokens of a sequence on one rank, which context parallelism does not give."""
    def layouts_with_cp(config):
        return any(variant.parallel.cp > 1 for variant in variants(ling_lite, config))

    loss = dataclasses.replace(ring_lite.algo.loss, surrogate="gspo")
    whole = dataclasses.replace(ring_lite, algo=dataclasses.replace(ring_lite.algo, loss=loss))
    assert layouts_with_cp(ring_lite) and not layouts_with_cp(whole)


def test_without_a_budget_every_response_is_counted(ring_lite):
    """Twice the prompts are twice the micro-batches; with a budget Phi alone decides."""
    def batches(objective, prompts):
        return expected_microbatches(dataclasses.replace(
            ring_lite, algo=dataclasses.replace(ring_lite.algo, objective=objective),
            rollout=dataclasses.replace(ring_lite.rollout, prompts_per_step=prompts)))

    assert batches("c3po", 512) == batches("c3po", 1024)
    assert batches("grpo", 1024) == pytest.approx(2 * batches("grpo", 512), rel=0.02)


def test_supervised_fine_tuning_is_planned_by_its_batch_and_without_anything_of_rl(capsys):
    """256 examples on 8 ranks: 32 of 16,384 tokens in the mean on each."""
    sft = load(["experiment=ring_mini_2_sft"])
    assert sft.algo.loss.kl_coef > 0 and expected_microbatches(sft) == 16
    assert plan_memory(network_of(sft), sft).reference == 0
    assert main(["plan", "experiment=ring_mini_2_sft"]) == 0
    shown = capsys.readouterr().out
    assert "step       256 examples, of up to 32,768 tokens" in shown
    assert not any(word in shown for word in ("Phi", "reference", "publishing"))


@pytest.mark.parametrize(("overrides", "message"), [
    (["model.architecture=deepseek_v3", "model.mtp=true"], "model.mtp=true: the layer behind the last"),
    (["experiment=ring_lite_rl_stage1", "model.mtp=true"], "model.mtp=true: this bailing_moe network has"),
    (["model.architecture=deepseek_v2_lite", "model.recompute=selective", "model.recompute_modules=[core_attn]"],
     "model.recompute_modules=core_attn: latent attention"),
])
def test_what_a_run_would_refuse_is_not_planned(overrides, message, capsys):
    assert main(["plan", *overrides]) != 0
    assert message in capsys.readouterr().err


def test_where_nothing_fits_the_smallest_are_shown(capsys):
    assert main(["plan", "experiment=ring_lite_rl_stage1", "parallel.world_size=8", "--gpu-memory", "16"]) == 0
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown and "no layout fits" in shown


@pytest.mark.parametrize(("command", "experiment", "layout", "gpus"), [
    *(("rl", "ring_lite_rl_stage1", layout, gpus)
      for layout, gpus in (("ling_lite_8", 8), ("ling_lite_64", 64), ("ring_lite_256", 256))),
    *((command, f"ring_mini_2_{command}", f"ring_mini_2_{gpus}", gpus)
      for command in ("sft", "rl") for gpus in (8, 64, 256))])
def test_a_shipped_layout_fits_and_is_accepted(command, experiment, layout, gpus):
    asked = [f"experiment={experiment}", f"parallel={layout}"]
    config = load(asked)
    assert config.parallel.world_size == gpus
    for backend in ("torch", "transformer_engine"):
        variant = dataclasses.replace(config, model=dataclasses.replace(config.model, backend=backend))
        assert plan_memory(network_of(config), variant).total <= Hardware().usable
    assert main([command, "--check", *asked]) == 0


def test_a_backend_decides_what_a_layer_keeps(ling_lite, ring_lite):
    """torch keeps per expert row h + 3f numbers and 3 widths of the shared experts, megatron h + 6f, 5 widths and the
    output of attention twice; Transformer Engine keeps of the fused projection only the values, copied."""
    def kept(backend):
        model = dataclasses.replace(ring_lite.model, recompute="none", backend=backend)
        return plan_memory(ling_lite, dataclasses.replace(ring_lite, model=model)).activations

    tokens, layers = 24_576, 28
    assert kept("megatron") - kept("torch") == 2 * tokens * layers * (6 * 3 * 1408 + 2 * 2 * 1408 + 16 * 128)
    assert kept("torch") - kept("transformer_engine") == 2 * tokens * layers * (16 * 128 + 4 * 128)


def test_the_last_stage_sets_the_pace_of_a_pipeline(ling_lite, ring_lite):
    """Its head costs half of its seven layers, so three of four stages wait a third of the time, however many
    micro-batches hide the pipeline's start."""
    parallel = ParallelConfig(world_size=8, tp=2, pp=4)
    config = dataclasses.replace(ring_lite, parallel=parallel)
    layers, head = microbatch_flops(ling_lite, config)
    assert (layers / 4 + head) / (layers / 4) == pytest.approx(1.53, abs=0.01)
    found = estimate(ling_lite, config, Hardware())
    assert found.bubble > 0.75 * head / (layers / 4 + head) * 0.9
    assert found.seconds > found.memory.num_microbatches * (layers / 4 + head) / 2 / Hardware().flops


def test_the_optimisers_temporaries_are_those_of_the_larger_one(ling_lite, ring_lite):
    """On 8 ranks: 1.3B dense parameters over 8 of them, 1.9B expert parameters on each alone; 4 bytes of each."""
    assert plan_memory(ling_lite, ring_lite).step == 4 * 1_937_768_448
    with_te = dataclasses.replace(ring_lite, model=dataclasses.replace(ring_lite.model, backend="transformer_engine"))
    assert plan_memory(ling_lite, with_te).step == 0


def test_states_on_the_host_leave_the_gpu_and_visit_it_in_slices(ling_lite, ring_lite):
    """On 8 ranks a slice is the dense optimiser's whole share, 1.3B / 8 elements, which is less than the embedding: 12
    bytes of state and 4 of temporaries for each."""
    plans = [plan_memory(ling_lite, dataclasses.replace(ring_lite, optimizer=dataclasses.replace(
        ring_lite.optimizer, offload=offload))) for offload in (False, True)]
    assert plans[1].host == plans[0].optimizer == 12 * (1_299_826_688 // 8 + 1_937_768_448)
    assert (plans[0].host, plans[1].optimizer) == (0, 0)
    assert plans[1].step == 16 * (1_299_826_688 // 8)
    assert plans[0].stays - plans[1].stays == plans[0].optimizer


def test_ling_lite_and_its_engines_take_turns_on_8_gpus_of_80_gb(ling_lite, capsys):
    """Between the steps the trainer keeps two copies of the weights and a bucket, 13.5 of 72 GB. Gradients of 12.9 GB
    and the optimiser's states would leave less."""
    asked = ["experiment=ring_lite_rl_stage1", "parallel=ling_lite_8", "rollout.engine.mem_fraction_static=0.73"]
    assert main(["plan", *asked, "--colocated"]) == 0
    assert re.search(r"peak +\d+\.\d+ GB  fits", capsys.readouterr().out)
    assert main(["plan", *asked[:2], "rollout.engine.mem_fraction_static=0.74", "--colocated"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert main(["plan", *asked, "--colocated", "optimizer.offload=false"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_what_is_recomputed_is_not_kept_and_costs_its_flops(ling_lite, ring_lite):
    """Experts and dense layers, by hand: per token a dense layer has 3 h i elements, one with experts 6 of 3 h f, the
    shared 3 h 2f, and the router; each is multiplied twice an element, once more."""
    def found(recompute, *modules):
        model = dataclasses.replace(ring_lite.model, recompute=recompute, recompute_modules=modules or ("moe", "mlp"))
        config = dataclasses.replace(ring_lite, model=model)
        return plan_memory(ling_lite, config), microbatch_flops(ling_lite, config)[0] / 24_576

    (none, flops), (selective, more), (full, most) = found("none"), found("selective"), found("full")
    assert full.activations < selective.activations < none.activations
    assert flops < more < most
    hidden, dense = 2048, ling_lite.num_hidden_layers - ling_lite.num_moe_layers
    experts = 3 * hidden * 1408 * (6 + 2) + hidden * 64
    assert more - flops == 2 * (dense * 3 * hidden * ling_lite.intermediate_size + ling_lite.num_moe_layers * experts)
    attention, _ = found("selective", "core_attn")
    assert selective.activations < attention.activations < none.activations


def test_an_engine_on_the_same_gpus_takes_its_share(capsys):
    """mem_fraction_static 0.85 of 80 GB."""
    assert main(["plan", "experiment=ring_lite_rl_stage1", "parallel.world_size=8", "--colocated"]) == 0
    assert re.search(r"^engine +68\.00 GB", capsys.readouterr().out, flags=re.MULTILINE)


def test_the_page_shows_what_the_command_prints(capsys):
    blocks = re.findall(r"^```\n\$ megatron-rl (.*)\n([^`]*)^```", PAGE.read_text(), flags=re.MULTILINE)
    assert len(blocks) == 3
    for command, shown in blocks:
        assert main(shlex.split(command)) == 0
        assert capsys.readouterr().out == shown


def test_adapters_alone_have_gradients_and_optimiser_state(ling_lite):
    """Ling-lite on two GPUs of 80 GB: by hand, fp32 gradients are 4 bytes of each of a rank's adapter parameters, and
    the reference of the KL term is the same weights."""
    options = ["experiment=ring_lite_rl_stage1", "parallel.world_size=2", "parallel.ep=2"]
    whole, lora = (plan_memory(ling_lite, load([*options, *more])) for more in ([], ["model.lora.rank=32"]))
    assert whole.total > 160e9 and lora.total < 40e9
    assert lora.gradients == pytest.approx(4 * lora.trained_parameters, rel=1e-3)
    dense = plan_memory(ling_lite, load([*options, "model.lora.rank=32", "model.lora.experts=none"])).trained_parameters
    experts = lora.trained_parameters - dense  # which the two ranks do not divide: each has other ones
    assert lora.optimizer == pytest.approx(12 * (dense / 2 + experts), rel=1e-3)
    assert (whole.reference, lora.reference) == (whole.weights, 0)
    held = lora.dense_parameters + lora.expert_parameters
    assert lora.weights == pytest.approx(2 * held, rel=1e-3)
    assert held - lora.trained_parameters == whole.dense_parameters + whole.expert_parameters
    other = plan_memory(ling_lite, load([*options, "model.lora.rank=32", "model.reference_path=elsewhere"]))
    assert other.reference == whole.reference  # a copy of the network, without adapters
