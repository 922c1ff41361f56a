"""The plan as plain text, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.config.schema import Config
from megatron_rl.model.adapters import count_trained
from megatron_rl.model.network import Network
from megatron_rl.model.slots import count_parameters
from megatron_rl.plan.layouts import Hardware, Proposal
from megatron_rl.plan.memory import MemoryPlan

GB = 10**9
KINDS = (
    ("weights", "weights", "{dtype}"),
    ("gradients", "gradients", "float32, whole on every rank"),
    ("optimizer", "optimiser", "{moments}"),
    ("reference", "reference", "frozen weights of the KL term"),
    ("engine", "engine", "SGLang's share of the same GPU, between the steps"),
    ("activations", "activations", "recompute={recompute}, {flight}"),
    ("layer", "layer", "one layer while it computes"),
    ("logits", "head", "{chunk:,} tokens of the head at a time, and its gradient; before or after the layers"),
    ("step", "step", "{step}"),
    ("publishing", "publishing", "one bucket, after the step"),
)


def plan_text(model: Network, config: Config, given: Proposal, proposals: Sequence[Proposal],
              hardware: Hardware) -> str:
    """given: the layout that was asked about; proposals: what to try instead."""
    return "\n".join([*_head(model, config, hardware), "", *_memory(config, given.memory, hardware), "",
                      *_proposals(given, proposals, hardware)])


def _head(model: Network, config: Config, hardware: Hardware) -> list[str]:
    total, active = count_parameters(model)
    parallel, algo, rollout = config.parallel, config.algo, config.rollout
    trained = f"Phi {algo.phi_global(parallel.dp):,} response tokens" if algo.has_budget else (
        f"{rollout.prompts_per_step * rollout.responses_per_prompt // algo.updates_per_rollout:,} whole responses "
        f"(algo.objective={algo.objective})")
    step = f"{trained}, sequences of up to {rollout.max_context_tokens:,}"
    if config.is_sft:
        room = config.batch.tokens_per_microbatch * parallel.cp
        step = f"{config.sft.batch_size:,} examples, of up to {room:,} tokens"
    trains = count_trained(model, config.model.lora)
    lora = [f"LoRA       {trains / 1e6:,.1f}M parameters of adapters train, {trains / total:.2%} of the model's "
            f"(rank {config.model.lora.rank}, experts {config.model.lora.experts})"] if config.model.lora.on else []
    return [
        f"model      {total / 1e9:.2f}B parameters, {active / 1e9:.2f}B active per token, {config.model.dtype}",
        *lora,
        f"layout     {parallel.world_size} GPUs of {hardware.gpu_memory / GB:g} GB: {layout(parallel)}",
        f"step       {step}",
    ]


def _memory(config: Config, plan: MemoryPlan, hardware: Hardware) -> list[str]:
    parallel = config.parallel
    flight = "one micro-batch in flight" if parallel.pp == 1 else "the micro-batches in flight of 1F1B"
    fills = {"dtype": config.model.dtype, "recompute": config.model.recompute, "flight": flight,
             "chunk": config.batch.logprob_chunk_tokens,
             "step": ("a slice of the optimiser's states, " if plan.host else "temporaries of AdamW, ")
             + "after the passes",
             "moments": "moments" + (" and float32 weights" if config.model.dtype != "float32" else "")
             + (", divided over data parallelism" if parallel.distributed_optimizer else "")}
    rows = [f"per rank   {plan.dense_parameters:,} dense and {plan.expert_parameters:,} expert parameters"
            f" (stage {plan.stage + 1} of {parallel.pp}, the fullest)",
            *([f"           {plan.trained_parameters:,} of adapters train, the others are frozen"]
              if config.model.lora.on else []),
            f"           {plan.num_microbatches} micro-batches of at most {config.batch.tokens_per_microbatch:,} "
            "tokens expected per step"]
    for field, name, remark in KINDS:
        size = getattr(plan, field)
        if size:
            rows.append(f"{name:<11}{size / GB:8.2f} GB  {remark.format(**fills)}")
    if plan.host:
        rows.append(f"{'(host)':<11}{plan.host / GB:8.2f} GB  {fills['moments']}, in host memory (optimizer.offload)")
    verdict = "fits" if plan.total <= hardware.usable else "DOES NOT FIT"
    return [*rows, f"{'peak':<11}{plan.total / GB:8.2f} GB  {verdict}: {hardware.usable / GB:g} GB usable "
                   f"({hardware.reserve:.0%} kept back)"]


def _proposals(given: Proposal, proposals: Sequence[Proposal], hardware: Hardware) -> list[str]:
    fit = proposals[0].memory.total <= hardware.usable
    title = "layouts that fit, fastest first" if fit else "no layout fits; the smallest first"
    return [f"{title} (times order layouts; they are arithmetic over assumed speeds, not measured)",
            f"{'':<34}{'recompute':>10}{'peak GB':>9}{'batches':>9}{'bubble':>8}{'traffic':>9}{'step':>9}",
            *map(_row, proposals), "the one asked about", _row(given)]


def _row(each: Proposal) -> str:
    return (f"{layout(each.parallel):<34}{each.recompute:>10}{each.memory.total / GB:>9.1f}"
            f"{each.memory.num_microbatches:>9}{each.bubble:>8.0%}{each.traffic_seconds / each.seconds:>9.0%}"
            f"{each.seconds:>7.1f} s")


def layout(parallel) -> str:
    sizes = [("tp", parallel.tp), ("pp", parallel.pp), ("vpp", parallel.vpp or 1), ("cp", parallel.cp),
             ("ep", parallel.ep), ("etp", parallel.etp)]
    return " ".join([*(f"{name}={size}" for name, size in sizes if size > 1), f"dp={parallel.dp}"])
