"""linear_logprob through Liger-Kernel's fused scaled cross entropy, an optional dependency (written for 0.8.5).

Its frontend takes 512-token chunks of plain torch, which round logits and entropy to the type of the inputs, so 16-bit
inputs are widened: a float32 copy of the head. On sm_90 it takes a CUTLASS kernel instead, which accepts bfloat16 alone
and returns a bfloat16 entropy (cutedsl/ops/fused_scaled_cross_entropy_sm90.py): refused, it misses the error budget.
"""

from __future__ import annotations

import torch

from rl_kernels.linear_logprob.products import math_dtype

__all__ = ["linear_logprob_liger"]

IGNORED = -100


def linear_logprob_liger(scaled_TH, weight_VH, labels_T, *, temperature, with_entropy):
    """(log-prob, entropy or None), float32 [T], with Liger's own gradients.

    ValueError if it is not installed, or on a Hopper GPU.
    """
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction
    except ImportError as error:
        raise ValueError("linear_logprob: impl='liger' needs liger-kernel>=0.8.5, which is not installed; use another "
                         "impl") from error
    if scaled_TH.is_cuda and torch.cuda.get_device_capability(scaled_TH.device) == (9, 0):
        raise ValueError("linear_logprob: impl='liger' rounds the entropy to bfloat16 on this GPU; use 'chunked'")
    dtype = math_dtype(weight_VH)
    outputs = LigerFusedLinearScaledCrossEntropyFunction.apply(
        scaled_TH.to(dtype), weight_VH.to(dtype), torch.where(labels_T < 0, IGNORED, labels_T), temperature, IGNORED,
        return_entropy=with_entropy)
    nll_T, entropy_T = outputs if with_entropy else (outputs, None)
    return -nll_T, entropy_T if entropy_T is None else entropy_T.float()
