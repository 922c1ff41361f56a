"""Bytes of activations, term by term, and how many micro-batches hold them at once.

Counted from the modules of model/spec.py and megatron-core 0.19.2. tests/distributed/test_plan.py compares what is
kept with what autograd saves on a CPU; tests/distributed/test_ling_lite_rehearsal.py compares the peak with a
rehearsal as on a GPU. Terms are per token of the micro-batch; experts are taken to be evenly loaded. Under sequence
parallelism what lies between the tensor-parallel blocks is kept for 1/t of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rl.config.lora import LoraConfig
from megatron_rl.config.schema import ParallelConfig
from megatron_rl.model.backend import WITH_DEVICE_COUNTS, Backend
from megatron_rl.model.network import Network
from megatron_rl.plan.parameters import Chunk

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Arithmetic:
    """What decides how many bytes a layer keeps. element: bytes of a number. backend: what computes its parts. gpu:
    RMSNorm is one kernel there, which keeps no float32 copy of its input. lora: adapters, which keep A x. recompute,
    modules: model.recompute and its modules."""

    element: int
    backend: Backend
    gpu: bool = True
    lora: LoraConfig = field(default_factory=LoraConfig)
    recompute: str = "none"
    modules: tuple[str, ...] = ()

    @property
    def grouped(self) -> bool:
        """The experts of a rank are one product, which keeps its input, the first product and the second's input."""
        return self.backend.kernels.experts in (*WITH_DEVICE_COUNTS, "transformer_engine")

    @property
    def with_te(self) -> bool:
        return self.backend.name == "transformer_engine"


def layer_bytes(model: Network, parallel: ParallelConfig, how: Arithmetic, *, dense: bool) -> float:
    """What autograd saves of one whole layer, in bytes per token of this context-parallel rank."""
    tp, hidden, element = parallel.tp, model.hidden_size, how.element
    norms = 2 * _norm_bytes(hidden, how) / tp
    inputs = 2 * element * hidden / tp  # of the attention and of the MLP, after their norms
    attention = _latent_bytes(model, parallel, how) if model.kv_lora_rank else \
        _head_norm_bytes(model, parallel, how) + _attention_bytes(model, parallel, how)
    mlp = _mlp_bytes(model.intermediate_size / tp, how) if dense else _moe_bytes(model, parallel, how)
    return norms + inputs + attention + mlp + _adapter_bytes(model, parallel, how, dense=dense)


def _norm_bytes(width: float, how: Arithmetic) -> float:
    """Its input and the inverse root; on a CPU its input and the normalised input, in float32."""
    return how.element * width + FP32 if how.gpu else 2 * FP32 * width


def _attention_bytes(model: Network, parallel: ParallelConfig, how: Arithmetic) -> float:
    """Grouped-query attention from its projection to the input of its last one, but for the heads' norms."""
    tp = parallel.tp
    query, key_value = (heads * model.head_dim / tp for heads in (model.num_attention_heads, model.num_key_value_heads))
    if how.with_te:
        keys = 2 * key_value  # rotated keys, and values copied out of the projection
    elif parallel.cp == 1:
        keys = query + 2 * key_value + key_value  # the fused projection, which holds the values, and rotated keys
    else:
        keys = 2 * key_value * (parallel.cp + 0.5)  # those of all context-parallel ranks that two chunks see
    outputs = query * (1 if how.backend.attention_at_once else 2)  # run by run: each run's, and all together
    return how.element * (keys + query + outputs) + FP32 * model.num_attention_heads / tp  # log-sum-exp


def _head_norm_bytes(model: Network, parallel: ParallelConfig, how: Arithmetic) -> float:
    heads = (model.num_attention_heads + model.num_key_value_heads) / parallel.tp
    return (how.element if how.gpu else 2 * FP32) * heads * model.head_dim if model.qk_norm else 0


def _latent_bytes(model: Network, parallel: ParallelConfig, how: Arithmetic) -> float:
    """Latent attention from its first projections to the input of its last one."""
    tp, heads = parallel.tp, model.num_attention_heads / parallel.tp
    latents = [width for width in (model.q_lora_rank, model.kv_lora_rank) if width]
    down = sum(_norm_bytes(width, how) + how.element * width for width in latents) / tp  # and what is led up
    if how.gpu:
        down += how.element * model.qk_rope_head_dim / tp  # lies beside the latent vector
    query, widened = model.head_dim, model.value_dim < model.head_dim
    keys = 2 * query * (parallel.cp + 0.5 if parallel.cp > 1 else 1)
    if parallel.cp == 1 and not widened:
        keys += model.qk_nope_head_dim  # lies beside the values
    outputs = query + model.value_dim if widened or not how.backend.attention_at_once else query
    return down + heads * (how.element * (query + keys + outputs) + FP32)


def again_bytes(model: Network, parallel: ParallelConfig, how: Arithmetic, *, dense: bool) -> list[float]:
    """What one layer does not keep because the backward pass computes it again, a part for each checkpoint that runs by
    itself, in bytes per token. With `full` the layer is one; with `selective` its MLP or experts, and its attention."""
    if how.recompute == "full":
        return [layer_bytes(model, parallel, how, dense=dense)]
    if how.recompute == "none":
        return []
    query, key_value = (heads * model.head_dim / parallel.tp
                        for heads in (model.num_attention_heads, model.num_key_value_heads))
    shared = _mlp_bytes(model.shared_intermediate_size / parallel.tp, how)
    parts = {"mlp": _mlp_bytes(model.intermediate_size / parallel.tp, how)} if dense else \
        {"moe": _moe_bytes(model, parallel, how)} if "moe" in how.modules else {"shared_experts": shared}
    if not model.kv_lora_rank:  # besides query, key and value as they are projected, and the output
        parts["core_attn"] = _attention_bytes(model, parallel, how) - how.element * (2 * query + 2 * key_value)
    return [size for name, size in parts.items() if name in how.modules]


def _adapter_bytes(model: Network, parallel: ParallelConfig, how: Arithmetic, *, dense: bool) -> float:
    """A x of each adapter: of all tokens beside a column-parallel linear, of 1/t of them beside any other."""
    lora = how.lora
    if not lora.on:
        return 0
    apart = ("linear_proj", "linear_fc2", "linear_q_down_proj", "linear_kv_down_proj")
    mlp = dense or model.num_shared_experts > 0
    rows = sum(1 / parallel.tp if target in apart else 1 for target in lora.targets
               if mlp or target not in ("linear_fc1", "linear_fc2"))
    if not dense and lora.experts != "none":
        rows += expert_rows(model, parallel) * sum(target in lora.targets for target in ("linear_fc1", "linear_fc2"))
    return how.element * lora.rank * rows


def _mlp_bytes(width: float, how: Arithmetic) -> float:
    """Both halves of the first projection and their product; unfused also silu(gate) and a copy of the other half."""
    fused = how.with_te or how.backend.kernels.pointwise == "triton"
    return how.element * (3 if fused else 5) * width


def expert_rows(model: Network, parallel: ParallelConfig) -> float:
    """Rows of this rank's experts, per token of the micro-batch."""
    return model.num_experts_per_tok * parallel.etp / parallel.tp


def _moe_bytes(model: Network, parallel: ParallelConfig, how: Arithmetic) -> float:
    experts, chosen = model.num_experts, model.num_experts_per_tok
    width = model.moe_intermediate_size / parallel.etp
    # the input, sorted by expert; then as an MLP, and the product before the gate's weight
    routed = expert_rows(model, parallel) * how.element * (model.hidden_size + (3 if how.grouped else 5 + 1) * width)
    router = (2 * FP32 * experts + INT64 * experts + chosen * 2 * (FP32 + INT64)) / parallel.tp
    return routed + router + _mlp_bytes(model.shared_intermediate_size / parallel.tp, how)


def layer_temporaries(model: Network, parallel: ParallelConfig, how: Arithmetic, *, dense: bool) -> float:
    """What one layer needs at once beside what it keeps, in bytes per token: the fuller of two moments of its experts.

    Combining: the experts' output and the same sorted back; then, of 1/etp of the rows, what comes back of the
    exchange and the rows that were sent. With etp above 1 the partial outputs are summed in float32.
    Their backward pass: the gradients of the second product's output and input. (Gradients of the experts' matrices
    are in `expert_gradient_bytes`.) The layer's output and its gradient are there in both.
    """
    own = 2 * how.element * model.hidden_size / parallel.tp
    if dense:
        return own + how.element * 2 * model.intermediate_size / parallel.tp
    rows, hidden = expert_rows(model, parallel), model.hidden_size
    summed = FP32 if parallel.etp > 1 else 0
    combining = (1 + 1 / parallel.etp) * rows * hidden * (2 * how.element + summed) if exchanges(parallel) else 0
    return own + max(combining, rows * how.element * (hidden + model.moe_intermediate_size / parallel.etp))


def exchanges(parallel: ParallelConfig) -> bool:
    """Whether rows travel to the ranks of their experts."""
    return parallel.ep * parallel.tp > 1


def buffer_bytes(model: Network, parallel: ParallelConfig, how: Arithmetic, stage: int) -> float:
    """Megatron's buffer of rows gathered over tensor-parallel ranks, and what a stage receives ahead; per token."""
    return how.element * model.hidden_size * ((parallel.tp > 1) + (stage > 0) / parallel.tp)


def expert_gradient_bytes(model: Network, parallel: ParallelConfig, how: Arithmetic) -> int:
    """The gradient of the second matrices of a rank's experts, twice: as the product makes it, and without the experts
    that had no row. It is there in the second moment of `layer_temporaries`, which counts if nothing is exchanged."""
    if not (how.grouped and model.num_experts) or exchanges(parallel) or how.lora.on:
        return 0
    return 2 * how.element * model.num_experts * model.hidden_size * model.moe_intermediate_size


def chunk_bytes(model: Network, parallel: ParallelConfig, chunk: Chunk, how: Arithmetic) -> float:
    """What stays of one micro-batch in one chunk between its forward and its backward pass, per token.

    Under recompute without the head, which is done before the first layer is recomputed (`head_bytes`).
    """
    hidden = how.element * model.hidden_size / parallel.tp
    sent_on = 0 if chunk.last else hidden
    rotation = 2 * (model.rotary_dim or model.head_dim) * FP32  # cosine and sine, for all layers
    if how.recompute == "full":
        return len(chunk.layers) * hidden + sent_on + rotation
    head = head_bytes(model, parallel, how) if chunk.last and how.recompute == "none" else 0
    return sent_on + rotation + head + sum(
        layer_bytes(model, parallel, how, dense=dense) - sum(again_bytes(model, parallel, how, dense=dense))
        for dense in map(model.is_dense_layer, chunk.layers))


def head_bytes(model: Network, parallel: ParallelConfig, how: Arithmetic) -> float:
    """The final norm, the hidden states of all tokens (gathered over t), label, log-sum-exp and entropy."""
    norm = (how.element * model.hidden_size + FP32 if how.gpu else 2 * FP32 * model.hidden_size) / parallel.tp
    return norm + how.element * model.hidden_size + INT64 + 2 * FP32


def mtp_bytes(model: Network, parallel: ParallelConfig, how: Arithmetic) -> float:
    """What the layer behind the last keeps of a micro-batch, also under recompute: a layer, the two norms before it,
    its two inputs side by side, and what its head keeps. It is done before the trunk's backward pass begins."""
    hidden = model.hidden_size
    norms = 2 * ((how.element * hidden + FP32) if how.gpu else 2 * FP32 * hidden) / parallel.tp
    if parallel.tp == 1:
        norms -= how.element * hidden  # the states, which the trunk's head keeps too
    again = sum(again_bytes(model, parallel, how, dense=False)) if how.recompute == "selective" else 0
    return (norms + 2 * how.element * hidden / parallel.tp + layer_bytes(model, parallel, how, dense=False) - again
            + head_bytes(model, parallel, how))


def fullest_layer(model: Network, parallel: ParallelConfig, chunk: Chunk, how: Arithmetic) -> tuple[float, float]:
    """(what the fullest layer of a chunk keeps while it is computed again, its temporaries), per token."""
    kinds = {model.is_dense_layer(layer) for layer in chunk.layers}
    return max((max(again_bytes(model, parallel, how, dense=dense), default=0),
                layer_temporaries(model, parallel, how, dense=dense)) for dense in kinds)


def chunks_in_flight(parallel: ParallelConfig, stage: int, num_microbatches: int) -> int:
    """Chunk passes whose activations a stage holds at its fullest: Megatron's 1F1B, plain or interleaved.

    schedules.get_pp_rank_microbatches: the warm-up passes, and the one that follows them.
    """
    chunks = parallel.vpp or 1
    warm_up = parallel.pp - stage - 1
    if parallel.vpp:
        warm_up = 2 * warm_up + (chunks - 1) * parallel.pp
    return min(warm_up + 1, num_microbatches * chunks)
