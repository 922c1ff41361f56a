"""Network (network.py) -> Megatron's TransformerConfig."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from megatron_rl.config.schema import ModelConfig, ParallelConfig
from megatron_rl.model.backend import Backend
from megatron_rl.model.network import Network

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(model: Network, options: ModelConfig, parallel: ParallelConfig,
                       backend: Backend) -> TransformerConfig:
    """Megatron's TransformerConfig of this network and layout.

    norm_topk_prob: softmax over the chosen k logits equals softmax, top-k, renormalise, hence
    moe_router_pre_softmax=False; without renormalisation it is the plain softmax taken first. Megatron always
    divides sigmoid scores by their sum (moe_utils.topk_routing_with_score_function).
    Router losses are BudgetRouter's own (router.py), so Megatron's load balancing is off.
    attention_backend is read by Transformer Engine alone: cuDNN's fused attention, and an error if that does
    not take the micro-batch. Its `auto` would take a beta of FlashAttention 4, or write all scores, without a word.
    Transformer Engine's layers come with Megatron's fused SwiGLU and, where its experts run, fused permutation.
    """
    dtype, fused = DTYPES[options.dtype], backend.name == "transformer_engine"
    recompute: dict[str, Any] = {
        "none": {}, "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        "selective": {"recompute_granularity": "selective", "recompute_modules": list(options.recompute_modules)},
    }[options.recompute]
    pipeline = {"overlap_p2p_comm": True, "batch_p2p_comm": False} if parallel.vpp else {}
    return TransformerConfig(
        num_layers=model.num_hidden_layers, hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads, num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim, ffn_hidden_size=model.intermediate_size,
        add_bias_linear=False, add_qkv_bias=model.qkv_bias, qk_layernorm=model.qk_norm, normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps, gated_linear_unit=True, activation_func=F.silu,
        hidden_dropout=0.0, attention_dropout=0.0, attention_softmax_in_fp32=True,
        attention_backend=AttnBackend.fused,
        use_te_activation_func=backend.kernels.pointwise == "triton",  # kernel_layers.SwiGLU, in spec.py
        bias_activation_fusion=fused, bias_dropout_fusion=False, masked_softmax_fusion=False,
        apply_rope_fusion=False, gradient_accumulation_fusion=False, persist_layer_norm=False,
        **_experts(model, parallel, grouped=backend.kernels.experts == "transformer_engine"),
        tensor_model_parallel_size=parallel.tp, pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        expert_model_parallel_size=parallel.ep, expert_tensor_parallel_size=parallel.etp,
        context_parallel_size=parallel.cp, sequence_parallel=parallel.use_sequence_parallel,
        variable_seq_lengths=parallel.pp > 1, calculate_per_token_loss=False,
        bf16=dtype == torch.bfloat16, params_dtype=dtype, pipeline_dtype=dtype,
        use_cpu_initialization=True, perform_initialization=False, **recompute, **pipeline)


def _experts(model: Network, parallel: ParallelConfig, *, grouped: bool) -> dict[str, Any]:
    if model.num_experts == 0:
        return {"moe_token_dispatcher_type": "alltoall"}  # the default refuses sequences of varying lengths
    return {
        "num_moe_experts": model.num_experts, "moe_router_topk": model.num_experts_per_tok,
        "moe_ffn_hidden_size": model.moe_intermediate_size,
        "moe_layer_freq": [int(not model.is_dense_layer(layer)) for layer in range(model.num_hidden_layers)],
        "moe_shared_expert_intermediate_size": model.shared_intermediate_size or None,
        "moe_shared_expert_gate": model.shared_expert_gate,
        "moe_router_score_function": model.score_function, "moe_router_enable_expert_bias": model.expert_bias,
        "moe_router_num_groups": model.n_group if model.limits_groups else None,
        "moe_router_group_topk": model.topk_group if model.limits_groups else None,
        "moe_router_topk_scaling_factor": None if model.routed_scaling_factor == 1 else model.routed_scaling_factor,
        "moe_router_pre_softmax": not model.norm_topk_prob,
        "moe_router_dtype": "fp32", "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": grouped, "moe_token_dispatcher_type": parallel.token_dispatcher,
        "moe_permute_fusion": grouped,
    }
