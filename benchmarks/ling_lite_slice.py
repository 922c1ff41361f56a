"""Four layers of Ling-lite at their real size on one GPU: C3PO steps with model.backend=megatron and =torch.

Packed sequences of 8k to 24k tokens, random weights, bfloat16. A step is what the learner does with one batch: the pass
for old log-probabilities, then forward, backward and AdamW. Both arms train one model in one process and take turns:
`megatron` is SDPA by sequence, SequentialMLP, the eager router and chunked log-probabilities. `torch` is the torch
backend with what --experts, --router and --logprob name (model.kernels). `--backend transformer_engine` has layers of
its own, so it runs alone. Reported: tokens/s, model TFLOP/s (observe/flops.py), peak memory, also against what
`megatron-rl plan` says. --trace FOLDER leaves a profile of one update of each arm. `--quick` is the same program on a
small network, for machines without a GPU.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import Row, interleaved, main, median
from c3po import StepTotals
from megatron_rl import topology
from megatron_rl.batch import plan_microbatches
from megatron_rl.batch.pack import pack
from megatron_rl.config.kernels import KernelConfig
from megatron_rl.config.schema import AlgoConfig, BatchConfig, Config, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.model.architectures import HF_FILES, parse_config
from megatron_rl.model.attention import PackedSelfAttention, attend_at_once, attend_by_run
from megatron_rl.model.backend import Backend, resolve
from megatron_rl.model.build import Policy, build_policy
from megatron_rl.model.kernel_layers import KernelExperts, KernelRouter
from megatron_rl.model.network import Network
from megatron_rl.model.router import BudgetRouter
from megatron_rl.observe.flops import train_flops
from megatron_rl.plan.memory import plan_stage
from megatron_rl.train_step.optimizer import build_optimizer
from megatron_rl.train_step.step import TrainStep
from megatron_rl.trainer.objective import TokenObjective
from megatron_rl.types import TrainSample

LAYERS, CHUNK_TOKENS = 4, 1024
(SequentialMLP,) = KernelExperts.__bases__
TINY = {"vocab_size": 2048, "hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "intermediate_size": 256}


def network(*, small: bool) -> dict:
    """config.json of the slice."""
    raw = json.loads((HF_FILES / "ling_lite.json").read_text(encoding="utf-8"))
    return raw | {"num_hidden_layers": LAYERS, "max_position_embeddings": 32_768} | (TINY if small else {})


def samples(count: int, shortest: int, longest: int, vocab: int) -> list[TrainSample]:
    """Sequences of uniform length; the first sixteenth of each is its prompt."""
    rng = np.random.default_rng(0)
    made = []
    for index, length in enumerate(rng.integers(shortest, longest, count, endpoint=True)):
        mask = np.arange(length + 1) >= length // 16
        made.append(TrainSample(
            index=index, token_ids=rng.integers(0, vocab, length + 1).astype(np.int32), loss_mask=mask,
            rollout_logprobs=np.where(mask, -np.log(vocab), 0.0).astype(np.float32),
            advantage=float(rng.normal()), num_response_tokens=int(mask.sum())))
    return made


def initialise(policy, deviation: float) -> None:
    for gpt in policy.gpt_models:
        for parameter in gpt.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=deviation)


def choose(policy: Policy, step: TrainStep, backend: Backend) -> None:
    """Turns a policy that was built with any choice to `backend`: the layers' parameters are the same."""
    kernels = backend.kernels
    for gpt in policy.gpt_models:
        for module in gpt.modules():
            if isinstance(module, PackedSelfAttention):
                module.attend = attend_at_once if backend.attention_at_once else attend_by_run
            elif isinstance(module, SequentialMLP):
                module.__class__ = SequentialMLP if kernels.experts == "megatron" else KernelExperts
                module.impl = kernels.experts
            elif isinstance(module, BudgetRouter):
                module.__class__ = BudgetRouter if kernels.router == "megatron" else KernelRouter
                module.impl = kernels.router
    step._head = dataclasses.replace(step._head, impl=kernels.logprob)


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def planned_bytes(model: Network, options: ModelConfig, algo: AlgoConfig, tokens: list[int]) -> int:
    """The peak that `megatron-rl plan` gives for micro-batches of so many tokens."""
    config = Config(model=options, algo=algo, batch=BatchConfig(max(tokens), CHUNK_TOKENS))
    return plan_stage(model, config, 0, len(tokens)).total


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def record(arm: str, folder: str, update) -> None:
    """A profile of one update as FOLDER/ARM.json (chrome://tracing, perfetto), and its dearest operations printed."""
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
        update()
    Path(folder).mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(f"{folder}/{arm}.json")
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(arm, profile.key_averages().table(sort_by=order, row_limit=25), sep="\n")


def measure(*, quick: bool, backend: str, recompute: str, sequences: int, steps: int, experts: str, router: str,
            logprob: str, trace: str) -> tuple[list[Row], dict]:
    on_gpu = torch.cuda.is_available()
    if not quick and not on_gpu:
        raise SystemExit("the slice at its real size needs a CUDA device, and torch sees none; --quick runs without")
    shortest, longest = (128, 383) if quick else (8_192, 24_575)
    sequences, steps = (3, 1) if quick else (sequences, steps)
    options = ModelConfig(dtype="bfloat16", recompute=recompute, backend=backend,
                          kernels=KernelConfig(experts, router, logprob))
    ours = resolve(options, gpu=on_gpu)
    arms = {"megatron": resolve(ModelConfig(backend="megatron"), gpu=on_gpu)} if backend == "torch" else {}
    arms[backend] = ours
    raw, parallel = network(small=quick), ParallelConfig()
    here = topology.start(parallel, seed=0)
    model = parse_config(raw, "the slice")
    policy = build_policy(model, options, parallel, with_gradients=True)
    initialise(policy, model.initializer_range)
    optimizer = build_optimizer(policy, OptimizerConfig(), parallel)
    step = TrainStep(policy, optimizer, here, temperature=1.0, chunk_tokens=CHUNK_TOKENS)
    made = samples(sequences, shortest, longest, model.vocab_size)
    lengths = [len(sample.token_ids) - 1 for sample in made]
    plan, = plan_microbatches(lengths, dp_size=1, tokens_per_microbatch=longest + 1)
    phi = sum(int(sample.loss_mask.sum()) for sample in made)
    algo = AlgoConfig(phi=phi)
    algo = dataclasses.replace(algo, loss=dataclasses.replace(algo.loss, kl_coef=0.0))
    objective = TokenObjective(algo, StepTotals(phi=phi, selected_tokens=phi, num_responses=len(made),
                                                max_response_tokens=longest))
    batches = [pack([made[i] for i in members], multiple_of=1, device=here.device) for members in plan]
    peaks, gauges, counts = {}, {}, {}

    def turn_to(arm: str) -> None:
        if len(arms) > 1:
            choose(policy, step, arms[arm])

    def old_logprobs(arm: str) -> None:
        turn_to(arm)
        old, counts[arm] = step.count_routing(batches)
        for batch, logprobs_T in zip(batches, old, strict=True):
            batch.old_logprobs = logprobs_T
        wait()

    def update(arm: str) -> None:
        turn_to(arm)
        reset_peak_memory()
        result = step.update(batches, objective, lr=1e-6, balance_coef=algo.balance_coef,
                             z_loss_coef=algo.z_loss_coef, counts=counts[arm])
        wait()
        assert not result.skipped and result.gauges["train/selected_tokens"] == phi
        peaks[arm], gauges[arm] = peak_memory_bytes(), dict(result.gauges)

    passes = interleaved({arm: lambda arm=arm: old_logprobs(arm) for arm in arms}, repeats=steps)
    updates = interleaved({arm: lambda arm=arm: update(arm) for arm in arms}, repeats=steps)
    for arm in arms if trace else ():
        record(arm, trace, lambda arm=arm: update(arm))
    tokens, flops = sum(lengths), train_flops(vars(model), lengths)
    name = (f"{backend}: {LAYERS} layers of {'a small network' if quick else 'Ling-lite'}, {tokens} tokens in "
            f"{len(plan)} micro-batches")

    def rates(work: float, seconds: dict[str, list[float]]) -> tuple[float, float | None]:
        return work / median(seconds[backend]), work / median(seconds["megatron"]) if "megatron" in seconds else None

    planned = planned_bytes(model, options, algo, [len(batch.input_ids) for batch in batches])
    rows = [Row(f"{name}: update", *rates(tokens, updates), "tokens/s"),
            Row(f"{name}: update", *rates(flops / 1e12, updates), "model TFLOP/s"),
            Row(f"{name}: old log-probabilities", *rates(tokens, passes), "tokens/s"),
            *([Row(f"{name}: peak memory of an update", peaks[backend] / 1e9, peaks["megatron"] / 1e9, "GB")]
              if peaks.get("megatron") else []),  # the pretended GPU counts no memory
            Row(f"{name}: peak memory against `plan`", peaks[backend] / 1e9, planned / 1e9, "GB")]
    parameters = sum(parameter.numel() for gpt in policy.gpt_models for parameter in gpt.parameters())
    topology.stop()
    return rows, {"device": str(here.device), "lengths": lengths, "parameters": parameters, "recompute": recompute,
                  "ours": dataclasses.asdict(ours), "logprob_seconds": passes, "update_seconds": updates,
                  "peak_bytes": peaks, "last_gauges": gauges}


if __name__ == "__main__":
    main("ling_lite_slice", measure, backend="torch", recompute="full", sequences=8, steps=3, experts="auto",
         router="auto", logprob="auto", trace="")
