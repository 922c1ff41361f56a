"""Layouts of a world size, those that fit ordered by an estimate of the step's time.

The estimate is arithmetic over the stated speeds, for ordering only; nothing of it was measured:

    step = m (stage + head) + (p - 1) / v stage + data traffic + the optimiser's states from the host and back

Nothing overlaps here: parallel.overlap and parallel.overlap_shared_experts change no second of it.

stage: a micro-batch's FLOPs in the layers of one of p stages (plus the forward pass again under recompute) at the
stated rate, and the tensor, expert and context traffic: bytes that a rank sends, over the link that its group reaches
across. head: its FLOPs, which the last stage has and the others wait for. m micro-batches, v chunks to a stage. The
bubble is the share of the pipeline's time in which a stage does nothing, on average.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rl.config.check import check_rl, check_sft
from megatron_rl.config.schema import RECOMPUTE_MODULES, Config, ParallelConfig
from megatron_rl.model.network import Network, check_layout
from megatron_rl.model.slots import count_parameters
from megatron_rl.plan.memory import ELEMENT_BYTES, MemoryPlan, plan_memory, state_bytes
from megatron_rl.plan.parameters import mtp_chunk, stage_chunks

GB = 10**9


@dataclass(frozen=True)
class Hardware:
    """What is assumed of the machines: an 80 GB GPU, 8 to a node. Speeds are those a step may count on, not peaks."""

    gpu_memory: float = 80 * GB
    reserve: float = 0.1  # of the memory: CUDA context, communication buffers, temporaries, fragmentation
    gpus_per_node: int = 8
    flops: float = 300e12
    host_bytes_per_s: float = 25 * GB
    node_bytes_per_s: float = 200 * GB
    network_bytes_per_s: float = 25 * GB

    @property
    def usable(self) -> float:
        return self.gpu_memory * (1 - self.reserve)

    def engine_bytes(self, config: Config) -> int:
        """What engines on the trainer's GPUs take of each, between the steps."""
        engine = config.rollout.engine
        return round(engine.mem_fraction_static * self.gpu_memory) if engine.colocate else 0


@dataclass(frozen=True)
class Proposal:
    """One layout with its memory and its estimate. seconds: of one optimiser step; bubble: share of it, 0 to 1."""

    parallel: ParallelConfig
    recompute: str
    memory: MemoryPlan
    seconds: float
    traffic_seconds: float
    bubble: float


def propose(model: Network, config: Config, hardware: Hardware, *, engine_bytes: int = 0,
            count: int = 5) -> list[Proposal]:
    """The `count` fastest layouts of config.parallel.world_size that fit; if none fits, the smallest ones."""
    proposals = [estimate(model, variant, hardware, engine_bytes=engine_bytes) for variant in variants(model, config)]
    fitting = [proposal for proposal in proposals if proposal.memory.total <= hardware.usable]
    if not fitting:
        return sorted(proposals, key=lambda proposal: proposal.memory.total)[:count]
    return sorted(fitting, key=lambda proposal: (proposal.seconds, proposal.memory.total))[:count]


def variants(model: Network, config: Config) -> Iterator[Config]:
    """`config` under every layout that the rules allow, with each recompute; Phi of the cluster stays."""
    world = config.parallel.world_size
    algo = dataclasses.replace(config.algo, scope="global", phi=config.algo.phi_global(config.parallel.dp))
    powers = [size for size in (1, 2, 4, 8) if world % size == 0]
    longest = 1 if config.model.mtp else min(world, model.num_hidden_layers)
    pipelines = [size for size in range(1, longest + 1)
                 if world % size == 0 and model.num_hidden_layers % size == 0]
    experts = [size for size in range(1, min(world, max(1, model.num_experts)) + 1)
               if world % size == 0 and max(1, model.num_experts) % size == 0]
    for tp, pp, cp, ep in itertools.product(powers, pipelines, powers, experts):
        for etp, vpp in itertools.product(sorted({1, tp}), (None, 2, 4)):
            try:
                parallel = dataclasses.replace(config.parallel, tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, cp=cp)
                check_layout(model, parallel)
                variant = dataclasses.replace(config, parallel=parallel, algo=algo)
                (check_sft if config.is_sft else check_rl)(variant, None)
            except ValueError:
                continue
            for recompute in ("none", "selective", "full"):
                yield dataclasses.replace(variant, model=dataclasses.replace(config.model, recompute=recompute))


def estimate(model: Network, config: Config, hardware: Hardware, *, engine_bytes: int = 0) -> Proposal:
    parallel = config.parallel
    memory = plan_memory(model, config, engine_bytes=engine_bytes)
    # every rank works at the pace of full micro-batches, every stage at the pace of the last one
    layers, head = (flops / parallel.tp / hardware.flops for flops in microbatch_flops(model, config))
    traffic = _traffic_seconds(model, config, hardware)
    stage, count = layers / parallel.pp + traffic, memory.num_microbatches
    pipeline = count * (stage + head) + (parallel.pp - 1) / (parallel.vpp or 1) * stage
    bubble = 1 - count * (stage + head / parallel.pp) / pipeline
    data = _data_seconds(model, config, hardware) + 2 * memory.host / hardware.host_bytes_per_s
    return Proposal(parallel, config.model.recompute, memory, pipeline + data, count * traffic + data, bubble)


def microbatch_flops(model: Network, config: Config) -> tuple[float, float]:
    """(of all layers, of the head) for one full micro-batch, forward and backward.

    A token sees a quarter of rollout.max_context_tokens: half of a sequence of the mean length. Under recompute layers
    run again, or their modules, but not the layer behind the last. A head takes its logits twice, and its two backward
    products in two halves below float32 (rl_kernels/linear_logprob/products.py). A frozen matrix has one backward
    product, for the gradient of its input.
    """
    frozen = config.model.lora.on
    _, active = _count(model)
    table = model.vocab_size * model.hidden_size
    matrices = 2 * (active - table * (1 if model.tie_word_embeddings else 2))
    attention = 2 * model.num_attention_heads * (model.head_dim + model.value_dim) \
        * config.rollout.max_context_tokens / 4
    again = _again(config)
    recomputed = matrices if config.model.recompute == "full" else 2 * sum(
        _module_parameters(model)[module] for module in again if module != "core_attn")
    layers = matrices * (3 - frozen) + recomputed + (3 + ("core_attn" in again)) * attention * model.num_hidden_layers
    head = 2 * table * (2 + (2 - frozen) * (1 if config.model.dtype == "float32" else 2))
    if config.model.mtp:
        idle = 3 * model.hidden_size * model.moe_intermediate_size * (model.num_experts - model.num_experts_per_tok)
        layers += 3 * (2 * (mtp_chunk(model, ParallelConfig()).num_parameters - idle) + attention)
        head += 2 * table * (2 + (1 if config.model.dtype == "float32" else 2))
    tokens = config.batch.tokens_per_microbatch
    return tokens * layers, tokens * head


def _again(config: Config) -> tuple[str, ...]:
    """The modules of a layer that run again in the backward pass; those that hold others without these."""
    model = config.model
    if model.recompute == "none":
        return ()
    return tuple(module for module in (RECOMPUTE_MODULES if model.recompute == "full" else model.recompute_modules)
                 if module != "shared_experts" or "moe" not in model.recompute_modules)


def _module_parameters(model: Network) -> dict[str, int]:
    """Elements of the matrices of each module that a token meets, in all layers."""
    dense = model.num_hidden_layers - model.num_moe_layers
    shared = 3 * model.hidden_size * model.shared_intermediate_size
    routed = model.num_experts_per_tok * 3 * model.hidden_size * model.moe_intermediate_size
    return {"mlp": dense * 3 * model.hidden_size * model.intermediate_size,
            "shared_experts": model.num_moe_layers * shared,
            "moe": model.num_moe_layers * (model.hidden_size * model.num_experts + routed + shared)}


def _traffic_seconds(model: Network, config: Config, hardware: Hardware) -> float:
    """What one full micro-batch spends in one stage."""
    parallel = config.parallel
    again = _again(config)  # passes of a part of a layer: forward, backward, and the forward again
    projections, experts, attention = (2 + each for each in (
        config.model.recompute == "full", "moe" in again, "core_attn" in again))
    row = ELEMENT_BYTES[config.model.dtype] * model.hidden_size
    per_layer = sum((
        # all-gather and reduce-scatter around attention and MLP, and the inputs gathered again for weight gradients
        (2 * (projections + experts) + 2) * _share(parallel.tp) * row / _speed(hardware, parallel.tp),
        # rows to their experts and back
        2 * experts * model.num_experts_per_tok / parallel.tp * _share(parallel.ep * parallel.etp) * row
        / _speed(hardware, parallel.ep * parallel.etp) * model.num_moe_layers / model.num_hidden_layers,
        # keys and values of the other context-parallel ranks
        (attention + 1) * _share(parallel.cp) * ELEMENT_BYTES[config.model.dtype] * model.num_key_value_heads
        * (model.head_dim + model.value_dim) / parallel.tp * parallel.cp / _speed(hardware, parallel.tp * parallel.cp)))
    return model.num_hidden_layers / parallel.pp * config.batch.tokens_per_microbatch * per_layer


_count = functools.cache(count_parameters)


def _data_seconds(model: Network, config: Config, hardware: Hardware) -> float:
    """Gradients reduced and new weights gathered of what trains, once a step."""
    parallel = config.parallel
    if parallel.world_size == parallel.tp * parallel.pp:
        return 0.0
    trained = [dataclasses.replace(chunk, frozen=(0, 0))
               for chunk in stage_chunks(model, parallel, 0, config.model.lora)]
    trained += [mtp_chunk(model, parallel)] if config.model.mtp else []
    weights, gradients, _ = state_bytes(trained, parallel, 2)
    return (weights + gradients) / _speed(hardware, parallel.world_size // parallel.pp)


def _share(ranks: int) -> float:
    """The share of what a group exchanges that leaves a rank."""
    return (ranks - 1) / ranks


def _speed(hardware: Hardware, span: int) -> float:
    """Bytes per second between ranks of a group that reaches over `span` neighbouring ranks."""
    return hardware.node_bytes_per_s if span <= hardware.gpus_per_node else hardware.network_bytes_per_s
