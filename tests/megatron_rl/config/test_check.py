"""Rules between sections: each names the keys, and the values of the report pass."""

import json
import re

import pytest
import torch

from megatron_rl import cli
from megatron_rl.config.check import Sizes, check_gloo, check_rl, summary
from megatron_rl.config.load import CONF_DIR, load
from megatron_rl.model.architectures import HF_FILES
from megatron_rl.orchestrator.stages import stage_configs
from megatron_rl.preflight import refuse_earlier_run

SIZES = Sizes(max_position_embeddings=512, total_parameters=1, active_parameters=1)


@pytest.mark.parametrize("overrides, message", [
    (["algo.cutoff=response", "algo.phi=79"], r"algo\.phi=79 .* smaller than one response.*max_response_tokens=80"),
    (["batch.tokens_per_microbatch=100"], r"batch\.tokens_per_microbatch=100 .*rollout\.max_context_tokens=128"),
    (["parallel=tp2", "batch.tokens_per_microbatch=8191"], r"tokens_per_microbatch=8191 must be a multiple of 2.*tp=2"),
    (["parallel.world_size=2", "parallel.cp=2", "batch.tokens_per_microbatch=62"],
     r"tokens_per_microbatch=62 x parallel\.cp=2 .*rollout\.max_context_tokens=128"),
    (["rollout.max_context_tokens=4096"], r"rollout\.max_context_tokens=4096 exceeds .*max_position_embeddings=512"),
    (["rollout.responses_per_prompt=1"], r"rollout\.responses_per_prompt=1"),
    (["algo.distillation.task_reward=false", "reward.shaping=[{term: length}]"],
     r"reward\.shaping with algo\.distillation\.task_reward=false"),
    (["algo.phi=1000000"], r"1000000 response tokens per rollout can never be met by 256 responses of at most 80"),
    (["algo.truncated=overlong_penalty", "algo.overlong_buffer_tokens=81"],
     r"algo\.overlong_buffer_tokens=81 is more than .*rollout\.max_response_tokens=80"),
    (["algo.mismatch=icepop", "rollout.top_p=0.9"], r"rollout\.top_p"),
    (["algo.objective=grpo", "algo.sequence_min_token_ratio=1e-4", "rollout.top_p=0.9"], r"rollout\.top_p"),
    (["rollout.collector=budgeted"], r"rollout\.collector=budgeted needs algo\.order=groups"),
    (["rollout.collector=budgeted", "algo.order=groups", "algo.objective=grpo"], r"budgeted .*algo\.objective=grpo"),
    (["rollout.collector=async"], r"rollout\.collector=async .*set algo\.mismatch"),
    (["rollout.collector=partial"], r"rollout\.collector=partial .*set algo\.mismatch"),
    (["rollout.collector=partial", "algo.mismatch=kpop", "rollout.budget_tokens=100", "algo.phi=1000",
      "algo.max_collect_rounds=9"], r"rollout\.budget_tokens=100 in 9 round\(s\) .* 1000 response tokens"),
    (["rollout.engine.router=local", "algo.router_replay=rollout"], r"rollout\.engine\.router drops .*router_replay"),
    (["parallel=tp2", "model.kernels.logprob=liger"], r"model\.kernels\.logprob=liger .*parallel\.tp=2 cuts"),
    *[([f"model.kernels.logprob={each}", "model.fp32_lm_head=false"],
       rf"model\.fp32_lm_head=false with model\.kernels\.logprob={each}, .*use chunked")
      for each in ("triton", "fused", "liger")],
    (["algo.loss.surrogate=gspo", "parallel.cp=2", "parallel.world_size=2"], r"parallel\.cp=2 .*surrogate=gspo"),
    (["algo=lpo", "parallel.cp=2", "parallel.world_size=2"], r"parallel\.cp=2 .*gspo or lpo"),
    (["algo.sequence_min_token_ratio=1e-4", "parallel.cp=2", "parallel.world_size=2"], r"parallel\.cp=2 .*sequence_"),
])
def test_a_rule_names_its_keys(overrides, message):
    with pytest.raises(ValueError, match=message):
        check_rl(load(["experiment=quickstart", "batch.tokens_per_microbatch=8192", *overrides]), SIZES)


QUICK = ["experiment=quickstart", "batch.tokens_per_microbatch=8192"]


@pytest.mark.parametrize("passes, fails, message", [
    (["parallel.world_size=2", "parallel.cp=2", "parallel.ep=1", "batch.tokens_per_microbatch=64"],
     ["batch.tokens_per_microbatch=62"], r"tokens_per_microbatch=62 x parallel\.cp=2"),
    (["rollout.collector=async", "rollout.max_staleness=0"], ["rollout.max_staleness=1"], r"set algo\.mismatch"),
    (["rollout.collector=partial", "algo.mismatch=tis", "algo.phi=100000", "rollout.prompts_per_step=1",
      "rollout.budget_tokens=100000", "algo.max_collect_rounds=1"], ["rollout.budget_tokens=99999"],
     r"rollout\.budget_tokens=99999 in 1 round\(s\) .* 100000 response tokens"),
    (["algo.phi=1"], ["algo.cutoff=response"], r"algo\.phi=1 .* smaller than one response"),
    (["algo.phi=1000000", "algo.objective=token_mean"], ["algo.objective=c3po"], r"can never be met by 256 responses"),
    (["parallel.world_size=2", "parallel.ep=1", "parallel.etp=2", "parallel.token_dispatcher=allgather"],
     ["parallel.token_dispatcher=alltoall"], r"parallel\.etp=2 with parallel\.tp=1, cp=1, ep=1: ranks"),
])
def test_a_rule_ends_where_it_says(passes, fails, message):
    """The first configuration passes; with one key changed, the rule that it just met refuses it."""
    def check(overrides: list[str]) -> None:
        config = load([*QUICK, *overrides])
        check_rl(config, SIZES)
        check_gloo(config.parallel)

    check(passes)
    with pytest.raises(ValueError, match=message):
        check([*passes, *fails])


def test_without_a_budget_phi_is_none():
    config = load(["experiment=quickstart", "algo.phi=1000000", "algo.objective=token_mean"])
    assert dict(summary(config, SIZES))["Phi"].startswith("none")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_phi_per_rank_is_multiplied_by_the_data_parallel_size(ranks):
    overrides = ["experiment=quickstart", "algo.scope=per_dp_rank", "algo.phi=4096", "parallel=single"]
    rows = dict(summary(load([*overrides, f"parallel.world_size={ranks}"]), SIZES))
    assert rows["Phi"].startswith(f"{4096 * ranks:,} response tokens per optimiser step over the cluster, 4,096 per")


def test_the_report_layout_checks_without_a_gpu(capsys):
    assert cli.main(["rl", "--check", "experiment=ring_lite_rl_stage1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "16.80B parameters, 2.75B active" in shown
    assert "256 = tp 1 x pp 1 x cp 1 x dp 256" in shown
    assert "52,428,800 response tokens per optimiser step" in shown  # 204,800 x 256; two steps make 409,600 x 256
    assert "204,800 per data-parallel" in shown


def test_ring_lite_values_are_the_reports():
    config = load(["experiment=ring_lite_rl_stage1"])
    assert config.algo.phi * config.algo.updates_per_rollout == 409_600
    assert (config.rollout.prompts_per_step, config.rollout.responses_per_prompt) == (512, 16)
    assert config.rollout.max_context_tokens == 24_576
    assert config.optimizer.lr == 3e-6
    loss = config.algo.loss
    assert (loss.clip_eps_low, loss.clip_eps_high, loss.kl_coef, loss.entropy_coef) == (0.2, 0.2, 1e-3, 5e-4)
    assert (config.algo.balance_coef, config.algo.z_loss_coef) == (1e-5, 1e-7)


def test_ring_lite_stages_and_sft_are_the_reports(capsys):
    for command in (["rl", "--check", "experiment=ring_lite_rl_stage2"], ["rl", "--check", "experiment=ring_lite_rl"],
                    ["sft", "--check", "experiment=ring_lite_sft"]):
        assert cli.main(command) == 0
        assert "256 = tp 1 x pp 1 x cp 1 x dp 256" in " ".join(capsys.readouterr().out.split())
    first, second, both = (load([f"experiment=ring_lite_{name}"]) for name in ("rl_stage1", "rl_stage2", "rl"))
    assert second.rollout.max_context_tokens == 32_768 and set(second.data.mix) == {"math", "code", "science"}
    assert (second.algo, second.optimizer) == (first.algo, first.optimizer)
    early, late = stage_configs(both)
    assert (early.rollout, early.batch, early.run.steps) == (first.rollout, first.batch, first.run.steps)
    assert early.data.weights == {"math": 1} and late.data == second.data and late.rollout == second.rollout
    assert first.eval.benchmarks["aime24"].samples == 32 and (first.eval.temperature, first.eval.top_p) == (1.0, 0.95)
    sft = load(["experiment=ring_lite_sft"])
    optimizer = sft.optimizer
    assert (optimizer.lr, optimizer.schedule, optimizer.warmup_fraction, optimizer.weight_decay) == (
        3e-4, "cosine", 0.01, 0.1)
    assert (sft.sft.batch_size, sft.sft.epochs, sft.rollout.max_context_tokens) == (256, 3, 32_768)
    assert read_config_of("ling_lite")["rope_theta"] == 600_000


@pytest.mark.parametrize("name", ["rl_stage1", "rl_stage2", "rl", "sft"])
def test_every_ring_lite_value_says_where_it_is_from(name):
    lines = (CONF_DIR / "experiment" / f"ring_lite_{name}.yaml").read_text().splitlines()
    values = [line for line in lines if re.match(r"\s*(- )?[\w.]+: \S", line)]
    unsaid = [line for line in values if not re.search(r"# (report|ours|Sec\. |Fig\. |Table )", line)]
    assert len(values) > 8 and not unsaid


def read_config_of(architecture):
    return json.loads((HF_FILES / f"{architecture}.json").read_text())


@pytest.mark.parametrize("overrides, message", [
    ([], "model.path is not set"),
    (["model.path=/nowhere"], "model.path=/nowhere: no config.json there"),
    (["model.architecture=ling_light"], "no such file, and no shipped one of that name"),
    (["experiment=ring_lite_rl_stage1", "parallel.ep=7", "parallel.world_size=7"],
     "parallel.ep=7 does not divide num_experts=64; 1, 2, 4, 8, 16 would"),
    (["experiment=ring_lite_rl_stage1", "parallel.etp=2", "parallel.ep=1"],
     "parallel.etp=2 with parallel.tp=1, cp=1, ep=1: ranks gather different numbers of rows, which needs GPUs"),
    (["experiment=ring_lite_rl_stage1", "model.kernels.experts=triton"], "model.kernels.experts=triton needs a GPU"),
    (["experiment=ring_lite_rl_stage1", "model.backend=torch", "model.dtype=float32", "slurm.gpus_per_node=8"],
     "model.backend=torch with model.dtype=float32: its attention takes bfloat16 on a GPU"),
    (["experiment=ring_lite_rl_stage1", "model.backend=transformer_engine"],
     "model.backend=transformer_engine: its kernels run on a GPU only, and there is none; leave it at auto"),
    (["experiment=ring_lite_rl_stage1", "model.backend=transformer_engine", "model.dtype=float32",
      "slurm.gpus_per_node=8"],
     "model.backend=transformer_engine with model.dtype=float32: its attention takes bfloat16 on a GPU"),
    (["experiment=ring_lite_rl_stage1", "model.kernels.experts=transformer_engine"],
     "model.kernels.experts=transformer_engine needs model.backend=transformer_engine"),
    (["experiment=ring_lite_rl_stage1", "parallel.tp=8"], "parallel.tp=8 does not divide num_key_value_heads=4"),
    (["experiment=ring_lite_rl_stage1", "model.mtp=true"],
     "model.mtp=true: this bailing_moe network has num_nextn_predict_layers=0, and one layer behind the last can be"),
    (["model.architecture=glm_4_5_air", "model.mtp=true", "parallel.pp=2", "parallel.world_size=2"],
     "model.mtp=true with parallel.pp=2: the layer behind the last needs the embedding and the last states on one"),
    (["model.architecture=glm_4_5_air", "model.mtp=true", "model.lora.rank=8"],
     "model.mtp=true with model.lora, which freezes all weights of model.path"),
    (["experiment=ring_lite_rl_stage1", "parallel.pp=3", "parallel.world_size=24"],
     "parallel.pp=3 does not divide num_hidden_layers=28"),
])
def test_a_wrong_model_or_layout_ends_with_exit_code_2(overrides, message, capsys):
    assert cli.main(["rl", "--check", *overrides]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_layout_for_gpus_elsewhere_is_checked_as_one(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    overrides = ["experiment=ring_lite_rl_stage1", "parallel.etp=2", "parallel.ep=1", "slurm.gpus_per_node=8"]
    assert cli.main(["rl", "--check", *overrides]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "ep 1 x etp 2" in said
    assert "torch: attention of a micro-batch at once, experts grouped_mm, router megatron" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what is chosen without a GPU")
def test_the_summary_says_what_auto_is_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["rl", "--check", "experiment=ring_lite_rl_stage1"]) == 0
    assert "megatron: attention sequence by sequence, experts megatron" in " ".join(capsys.readouterr().out.split())


def test_a_run_is_never_written_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="holds an earlier run: continue it with resume=true"):
        refuse_earlier_run(load([f"run.dir={tmp_path}"]))
