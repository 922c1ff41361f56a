"""From decoder states to log-probabilities and exact entropy, in chunks, without a [T, V] matrix.

`head_outputs` is the output_processor that GPTModel.forward calls instead of its own output layer
(gpt_model.GPTModel._postprocess, megatron-core 0.19.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel

from rl_kernels.linear_logprob import Implementation, linear_logprob

NORM_HEAD_EPS = 1e-7


@dataclass(frozen=True)
class HeadOptions:
    """temperature: the sampling temperature, so that trainer and engine describe the same distribution.

    norm_head: divide each hidden column of the head by its norm over the vocabulary (spec: NormHead).
    fp32: logits are float32, as model.fp32_lm_head says; otherwise they are rounded to the weights' dtype.
    """

    temperature: float
    norm_head: bool
    chunk_tokens: int
    tp_group: object
    sequence_parallel: bool
    fp32: bool = True
    impl: Implementation = "auto"
    with_entropy: bool = True


def head_outputs(*, hidden_states, output_layer, output_weight, labels, context: HeadOptions, **_) -> torch.Tensor:
    """fp32 [2, T]: log-probability of labels [1, T] (int64) and entropy in nats; hidden_states [T or T/tp, 1, H].

    output_weight: the embedding if it is also the head, else None. Without context.with_entropy only the first row,
    [1, T].
    """
    hidden = hidden_states
    if context.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    elif context.tp_group.size() > 1:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    weight = output_layer.weight if output_weight is None else output_weight
    if context.norm_head:
        weight = weight / norm_head_norms(weight, context.tp_group)
    logprobs_T, entropy_T = linear_logprob(
        hidden.squeeze(1), weight, labels.squeeze(0), temperature=context.temperature, group=context.tp_group,
        chunk_tokens=context.chunk_tokens, with_entropy=context.with_entropy, rounded=not context.fp32,
        impl=context.impl)
    return torch.stack([logprobs_T, entropy_T]) if context.with_entropy else logprobs_T[None]


@torch.no_grad()
def norm_head_norms(weight_VH: torch.Tensor, tp_group) -> torch.Tensor:
    """[H], the norm of each column over the whole vocabulary; weight is this rank's rows.

    The norm has the weight's dtype, because the engine divides in that dtype (F.normalize in bailing_moe.py:
    load_weights, SGLang 0.5.23). Dividing in float32 without rounding would make another head than the one that
    samples.
    """
    squares_H = torch.linalg.vector_norm(weight_VH, dim=0, dtype=torch.float32).square()
    if tp_group.size() > 1:
        torch.distributed.all_reduce(squares_H, group=tp_group)
    return squares_H.sqrt().to(weight_VH.dtype).clamp_min(NORM_HEAD_EPS)
