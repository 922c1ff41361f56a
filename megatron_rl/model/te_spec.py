"""Megatron's Transformer Engine layers, with our router, routing replay and rotation in them.

Import this module only for model.backend=transformer_engine: its attention is a subclass of Transformer Engine's.
Written for megatron-core 0.19.2 and Transformer Engine 2.20.2, whose modules these are:

- self_attention.linear_qkv and the first projection of a dense layer: the norm and the product in one module. Their
  parameter `layer_norm_weight` is the other backends' input_layernorm.weight and pre_mlp_layernorm.weight.
- mlp.experts: one grouped product for all experts of a rank. `linear_fc1.weightN` is the other backends'
  local_experts.N.linear_fc1.weight.

Every other name, and the shape and cut of every parameter, is the same under all backends (convert.slots).
"""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention, TENorm
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_submodules
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from rl_kernels.pointwise import rotate


class PackedTEAttention(TEDotProductAttention):
    """Transformer Engine's attention of a packed micro-batch. It rotates queries and keys first.

    query [T, H, D], key and value [T, G, D], not yet rotated; packed_seq_params: PackedSequences. Returns [T, H*D].

    What Transformer Engine 2.20.2 asks of qkv_format=thd (pytorch/attention/dot_product_attention):

    - cu_seqlens_q, cu_seqlens_kv: int32 [S+1] on the device; max_seqlen_q, max_seqlen_kv: ints, or each layer would
      ask the device for them.
    - attn_mask_type: padding_causal. Megatron makes it of its own `causal`.
    - Under context parallelism all four are of the whole sequences, which the ranks hold in 2*cp chunks as
      batch/pack.py cuts them, and cu_seqlens_q_padded and cu_seqlens_kv_padded are given too.
    - pad_between_seqs: false, because padding is a sequence of its own. True would rule out FlashAttention 2.

    attention.packed_sequences fills them in. Megatron hands on the fields of its own PackedSeqParams, not ours.
    """

    def forward(self, query, key, value, *args, packed_seq_params, **kwargs):
        query, key = (rotate(heads, *packed_seq_params.rotation) for heads in (query, key))
        return super().forward(query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)


FINAL_NORM = TENorm


def layer_submodules(*, num_experts: int | None, qk_norm: bool) -> TransformerLayerSubmodules:
    """Megatron's Transformer Engine layer. A layer with experts gets its `mlp` from spec.py. ValueError without TE."""
    if not HAVE_TE:
        raise ValueError("model.backend=transformer_engine: Transformer Engine is not installed; install it (`make "
                         "setup VARIANT=gpu TE=1`), or set model.backend=torch")
    submodules = get_gpt_layer_with_transformer_engine_submodules(
        num_experts=num_experts, moe_grouped_gemm=True, qk_layernorm=qk_norm)
    submodules.self_attention.submodules.core_attention = PackedTEAttention
    return submodules


def experts_and_shared():
    """(builder of the routed experts, modules of the shared ones)."""
    provider = TESpecProvider()
    shared = MLPSubmodules(linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear(),
                           activation_func=provider.activation_func())
    return provider.grouped_mlp_modules(True), shared
