"""linear_logprob through Liger-Kernel's fused scaled cross entropy, an optional dependency (written for 0.8.5).

Its frontend picks a CUTLASS kernel on sm_90 and 512-token chunks of plain torch elsewhere, also on a CPU.
"""

from __future__ import annotations

import torch

__all__ = ["linear_logprob_liger"]

IGNORED = -100


def linear_logprob_liger(scaled_TH, weight_VH, labels_T, *, temperature, with_entropy):
    """(log-prob, entropy or None), float32 [T], with Liger's own gradients. ValueError where it is not installed."""
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction
    except ImportError as error:
        raise ValueError("linear_logprob: impl='liger' needs liger-kernel>=0.8.5, which is not installed; use another "
                         "impl") from error
    outputs = LigerFusedLinearScaledCrossEntropyFunction.apply(
        scaled_TH, weight_VH, torch.where(labels_T < 0, IGNORED, labels_T), temperature, IGNORED,
        return_entropy=with_entropy)
    nll_T, entropy_T = outputs if with_entropy else (outputs, None)
    return -nll_T, entropy_T if entropy_T is None else entropy_T.float()
