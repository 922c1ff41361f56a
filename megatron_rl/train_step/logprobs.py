"""From decoder states to log-probabilities and exact entropy, in chunks, without a [T, V] matrix.

`head_outputs` is the output_processor that GPTModel.forward calls instead of its own output layer
(gpt_model.GPTModel._postprocess, megatron-core 0.19.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel

from rl_kernels.linear_logprob import Implementation, chosen_logprobs, largest_ids, linear_logprob

NORM_HEAD_EPS = 1e-7


@dataclass(frozen=True)
class HeadOptions:
    """temperature: the sampling temperature, so that trainer and engine describe the same distribution.

    norm_head: divide each hidden column of the head by its norm over the vocabulary (spec: NormHead).
    fp32: logits are float32, as model.fp32_lm_head says; otherwise they are rounded to the weights' dtype.
    ids_Tk: int64 [T, k], further tokens of the vocabulary at each position whose log-probabilities are wanted. top_k:
    those of the k most probable tokens are wanted, with their ids.
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
    ids_Tk: torch.Tensor | None = None
    top_k: int = 0
    mtp: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    @property
    def common(self) -> dict[str, Any]:
        """What all functions of the head take."""
        return {"group": self.tp_group, "chunk_tokens": self.chunk_tokens, "rounded": not self.fp32}


def head_outputs(*, hidden_states, output_layer, output_weight, labels, context: HeadOptions, **_) -> torch.Tensor:
    """fp32 [2, T]: log-probability of labels [1, T] (int64) and entropy in nats; hidden_states [T or T/tp, 1, H].

    output_weight: the embedding if it is also the head, else None. Without context.with_entropy the second row is
    missing. Further rows: the k log-probabilities that context.ids_Tk or context.top_k asks for, then with top_k the k
    ids, which float32 holds exactly (below 2**24). With context.mtp one more row behind them.
    """
    weight = output_layer.weight if output_weight is None else output_weight
    if context.norm_head:
        weight = weight / norm_head_norms(weight, context.tp_group)
    hidden_TH, labels_T = whole_states(hidden_states, context), labels.squeeze(0)
    logprobs_T, entropy_T = _of_labels(hidden_TH, weight, labels_T, context)
    rows = [logprobs_T[None]] if entropy_T is None else [torch.stack([logprobs_T, entropy_T])]
    ids_Tk = largest_ids(hidden_TH, weight, context.top_k, **context.common) if context.top_k else context.ids_Tk
    if ids_Tk is not None:
        rows.append(chosen_logprobs(hidden_TH, weight, labels_T, logprobs_T, ids_Tk, temperature=context.temperature,
                                    **context.common).T)
    if context.top_k:
        rows.append(ids_Tk.T.to(logprobs_T.dtype))
    if context.mtp is not None:
        rows.append(context.mtp(hidden_states, weight)[None])
    return torch.cat(rows)


def whole_states(hidden: torch.Tensor, options: HeadOptions) -> torch.Tensor:
    """[T, H], on every tensor-parallel rank, of hidden [T or T/tp, 1, H]; its gradients are summed over these ranks."""
    if options.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    elif options.tp_group.size() > 1:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    return hidden.squeeze(1)


def token_logprobs(hidden: torch.Tensor, weight: torch.Tensor, labels_T: torch.Tensor,
                   options: HeadOptions) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(log-probability of each label, entropy in nats or None), fp32 [T]; hidden [T or T/tp, 1, H], weight this rank's
    rows of the head."""
    return _of_labels(whole_states(hidden, options), weight, labels_T, options)


def _of_labels(hidden_TH, weight, labels_T, options: HeadOptions) -> tuple[torch.Tensor, torch.Tensor | None]:
    return linear_logprob(hidden_TH, weight, labels_T, temperature=options.temperature,
                          with_entropy=options.with_entropy, impl=options.impl, **options.common)


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
