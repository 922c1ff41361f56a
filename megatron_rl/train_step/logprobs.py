"""From decoder states to log-probabilities and exact entropy, in chunks, without a [T, V] matrix.

`head_outputs` is the output_processor that GPTModel.forward calls instead of its own output layer
(gpt_model.GPTModel._postprocess, megatron-core 0.19.2).
"""

from __future__ import annotations

from collections.abc import Callable
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
    mtp: (states [T or T/tp, 1, H], head's matrix) -> fp32 [T], for one more row of the outputs (train_step/mtp.py).
    """

    temperature: float
    norm_head: bool
    chunk_tokens: int
    tp_group: object
    sequence_parallel: bool
    fp32: bool = True
    impl: Implementation = "auto"
    with_entropy: bool = True
    mtp: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


def head_outputs(*, hidden_states, output_layer, output_weight, labels, context: HeadOptions, **_) -> torch.Tensor:
    """fp32 [2, T]: log-probability of labels [1, T] (int64) and entropy in nats; hidden_states [T or T/tp, 1, H].

    output_weight: the embedding if it is also the head, else None. Without context.with_entropy only the first row,
    [1, T]. With context.mtp one more row behind them.
    """
    weight = output_layer.weight if output_weight is None else output_weight
    if context.norm_head:
        weight = weight / norm_head_norms(weight, context.tp_group)
    logprobs_T, entropy_T = token_logprobs(hidden_states, weight, labels.squeeze(0), context)
    rows = [logprobs_T, entropy_T] if context.with_entropy else [logprobs_T]
    if context.mtp is not None:
        rows.append(context.mtp(hidden_states, weight))
    return torch.stack(rows)


def token_logprobs(hidden: torch.Tensor, weight: torch.Tensor, labels_T: torch.Tensor,
                   options: HeadOptions) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(log-probability of each label, entropy in nats or None), fp32 [T]; hidden [T or T/tp, 1, H], weight this rank's
    rows of the head."""
    if options.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    elif options.tp_group.size() > 1:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    return linear_logprob(
        hidden.squeeze(1), weight, labels_T, temperature=options.temperature, group=options.tp_group,
        chunk_tokens=options.chunk_tokens, with_entropy=options.with_entropy, rounded=not options.fp32,
        impl=options.impl)


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
