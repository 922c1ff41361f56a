"""Bytes that the forward pass keeps for the backward pass, term by term, and how many micro-batches hold them at once.

Counted from the modules of model/spec.py and megatron-core 0.19.2's local layers; tests/ compares the sum with what
autograd saves. Terms are per token of the micro-batch; experts are taken to be evenly loaded. Under sequence
parallelism what lies between the tensor-parallel blocks is kept for 1/t of the tokens.
"""

from __future__ import annotations

from megatron_rl.config.schema import ParallelConfig
from megatron_rl.model.network import Network
from megatron_rl.plan.parameters import Chunk

FP32, INT64 = 4, 8


def layer_bytes(model: Network, parallel: ParallelConfig, *, dense: bool, element: int) -> float:
    """What autograd saves of one whole layer, in bytes per token of this context-parallel rank."""
    tp, hidden = parallel.tp, model.hidden_size
    query, key_value = (heads * model.head_dim / tp for heads in (model.num_attention_heads, model.num_key_value_heads))
    head_norms = 2 * FP32 * (query + key_value) if model.qk_norm else 0
    norms = 2 * 2 * FP32 * hidden / tp  # each: its input and the normalised input, in float32
    inputs = 2 * element * hidden / tp  # of the attention and of the MLP, after their norms
    # the fused projection, which holds the values, and the rotated keys; or those of all context-parallel ranks that
    # two chunks see, cp + 1/2 times this rank's
    keys = query + 2 * key_value + key_value if parallel.cp == 1 else 2 * key_value * (parallel.cp + 0.5)
    attention = element * (
        keys + query  # and the rotated queries
        + query + query  # the output, of each sequence and of all together
    ) + FP32 * model.num_attention_heads / tp  # log-sum-exp
    mlp = _mlp_bytes(model.intermediate_size / tp, element) if dense else _moe_bytes(model, parallel, element)
    return norms + head_norms + inputs + attention + mlp


def _mlp_bytes(width: float, element: int) -> float:
    """Both halves of the first projection, silu(gate), the copy of the other half, their product."""
    return element * 5 * width


def _moe_bytes(model: Network, parallel: ParallelConfig, element: int) -> float:
    experts, chosen = model.num_experts, model.num_experts_per_tok
    rows = chosen * parallel.etp / parallel.tp  # of this rank's experts, per token
    routed = rows * element * (
        model.hidden_size  # the input, sorted by expert
        + (5 + 1) * model.moe_intermediate_size / parallel.etp  # as an MLP, and the product before the gate's weight
    )
    router = (2 * FP32 * experts + INT64 * experts + chosen * 2 * (FP32 + INT64)) / parallel.tp
    return routed + router + _mlp_bytes(model.shared_intermediate_size / parallel.tp, element)


def chunk_bytes(model: Network, parallel: ParallelConfig, chunk: Chunk, *, element: int, recompute: bool) -> float:
    """What stays of one micro-batch in one chunk between its forward and its backward pass, per token.

    Under recompute without the head, which is done before the first layer is recomputed (`recomputed_bytes`).
    """
    sent_on = 0 if chunk.last else element * model.hidden_size / parallel.tp
    if recompute:
        return len(chunk.layers) * element * model.hidden_size / parallel.tp + sent_on
    rotation = 2 * model.head_dim * FP32  # cosine and sine, for all layers
    return sent_on + rotation + (head_bytes(model, parallel, element=element) if chunk.last else 0) + sum(
        layer_bytes(model, parallel, dense=model.is_dense_layer(layer), element=element) for layer in chunk.layers)


def head_bytes(model: Network, parallel: ParallelConfig, *, element: int) -> float:
    """The final norm, the hidden states of all tokens (gathered over t), label, log-sum-exp and entropy."""
    return 2 * FP32 * model.hidden_size / parallel.tp + element * model.hidden_size + INT64 + 2 * FP32


def recomputed_bytes(model: Network, parallel: ParallelConfig, chunk: Chunk, *, element: int) -> float:
    """What is alive beside the layers' inputs at most: one layer while it is recomputed, or the head before it."""
    kinds = {model.is_dense_layer(layer) for layer in chunk.layers}
    layer = max(layer_bytes(model, parallel, dense=dense, element=element) for dense in kinds)
    return max(layer, head_bytes(model, parallel, element=element)) if chunk.last else layer


def chunks_in_flight(parallel: ParallelConfig, stage: int, num_microbatches: int) -> int:
    """Chunk passes whose activations a stage holds at its fullest: Megatron's 1F1B, plain or interleaved.

    schedules.get_pp_rank_microbatches: the warm-up passes, and the one that follows them.
    """
    chunks = parallel.vpp or 1
    warm_up = parallel.pp - stage - 1
    if parallel.vpp:
        warm_up = 2 * warm_up + (chunks - 1) * parallel.pp
    return min(warm_up + 1, num_microbatches * chunks)
