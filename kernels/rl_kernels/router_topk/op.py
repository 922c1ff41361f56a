"""router_topk: which experts a token goes to, with what weight, and the sums of the balance and z-losses.

Letters: T tokens, E experts, K choices, H hidden size.
"""

from __future__ import annotations

from typing import Literal

import torch

from rl_kernels.router_topk.reference import Routed, router_topk_reference

__all__ = ["router_topk"]

Implementation = Literal["auto", "triton", "reference"]


def router_topk(
    hidden_TH: torch.Tensor,
    weight_EH: torch.Tensor,
    k: int,
    *,
    normalize: bool = True,
    indices_TK: torch.Tensor | None = None,
    real_T: torch.Tensor | None = None,
    impl: Implementation = "auto",
) -> Routed:
    """Top-k of p = softmax(h W^T) per token, with the logits in float32 whatever the inputs are.

    hidden_TH and weight_EH float, of any two dtypes. normalize: weights are p / sum of the K chosen p, which is the
    softmax over the chosen logits; else p itself. indices_TK int64: a replayed choice (distinct experts per token)
    takes the place of top-k; weights and gradients still flow through this router. real_T bool: False is padding; it
    routes, but counts in none of the sums.
    Routed: weights float32 [T, K], in order of falling p unless replayed; indices int64 [T, K]; over the real tokens,
    float32: counts [E] of choices, sums of p [E], sum of logsumexp(logits)^2 and of the entropy of p. balance loss =
    E * sum(F * prob_sums) / tokens, z-loss = z_sum / tokens. Gradients to hidden and weight from weights, prob_sums and
    z_sum. Equal logits: which of them is chosen is not defined.
    impl: "triton" needs a CUDA tensor or Triton's interpreter, and E <= 256; "auto" is "reference", the only one
    measured so far. Nothing falls back to another in silence. ValueError names what does not fit.
    """
    _validate(hidden_TH, weight_EH, k, indices_TK, real_T)
    if impl in ("auto", "reference"):
        return router_topk_reference(hidden_TH, weight_EH, k, normalize=normalize, indices_TK=indices_TK, real_T=real_T)
    if impl != "triton":
        raise ValueError(f"router_topk: impl={impl!r} must be auto, triton or reference")
    from rl_kernels.router_topk.triton_impl import TritonRouter
    from rl_kernels.triton_impl import require_device

    require_device(hidden_TH, "router_topk")
    require_device(weight_EH, "router_topk")
    if len(weight_EH) > 256:
        raise ValueError(f"router_topk: impl='triton' holds at most 256 experts in a tile, not {len(weight_EH)}")
    return Routed(*TritonRouter.apply(hidden_TH, weight_EH, indices_TK, real_T, k, normalize))


def _validate(hidden_TH, weight_EH, k, indices_TK, real_T):
    shapes = f"hidden_TH {tuple(hidden_TH.shape)}, weight_EH {tuple(weight_EH.shape)}"
    if hidden_TH.dim() != 2 or weight_EH.dim() != 2 or hidden_TH.shape[1] != weight_EH.shape[1]:
        raise ValueError(f"hidden_TH must be [T, H] and weight_EH [E, H] with the same H: {shapes}")
    if not 1 <= k <= len(weight_EH):
        raise ValueError(f"k={k} must lie between 1 and the {len(weight_EH)} experts")
    if indices_TK is not None and (indices_TK.shape != (len(hidden_TH), k) or indices_TK.dtype != torch.int64):
        raise ValueError(f"indices_TK must be int64 [T, {k}], not {indices_TK.dtype} {tuple(indices_TK.shape)}: "
                         f"{shapes}")
    if real_T is not None and (real_T.shape != hidden_TH.shape[:1] or real_T.dtype != torch.bool):
        raise ValueError(f"real_T must be bool [T], not {real_T.dtype} {tuple(real_T.shape)}: {shapes}")
