"""model.kernels: which implementation computes one part of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class KernelConfig:
    """Another implementation of one part of the step than model.backend takes (docs/performance.md).

    - experts: `megatron` is Megatron's SequentialMLP, `transformer_engine` its TEGroupedMLP, which needs
      model.backend=transformer_engine; the others are in rl_kernels.grouped_experts. `auto` is `grouped_mm` with
      model.backend=torch and named like the backend with the other two.
    - router: `megatron` is Megatron's TopKRouter, the others are in rl_kernels.router_topk. `auto` is `megatron`.
    - logprob: all are in rl_kernels.linear_logprob. `liger` and `reference` need parallel.tp=1. `auto` is `fused` with
      model.backend=torch on a GPU if model.fp32_lm_head is on, and `chunked` everywhere else.
    - pointwise: SwiGLU and rotation, in rl_kernels.pointwise. `auto`: `triton` with model.backend=torch on a GPU.

    `triton` and `fused` need a GPU. No choice falls back to another, and none changes parameters or checkpoints.
    """

    experts: Literal["auto", "megatron", "transformer_engine", "triton", "grouped_mm", "loop", "reference"] = "auto"
    router: Literal["auto", "megatron", "triton", "reference"] = "auto"
    logprob: Literal["auto", "triton", "fused", "chunked", "liger", "reference"] = "auto"
    pointwise: Literal["auto", "torch", "triton"] = "auto"
