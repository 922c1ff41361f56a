"""Megatron's norm and scaling of many gradients, for machines without Transformer Engine and Apex.

Written for Megatron-Core 0.19.2 (megatron/core/utils.py: local_multi_tensor_l2_norm, local_multi_tensor_scale). Its
own norm reads one number per tensor on the host, and its own scaling makes a copy of each. Here the norm stays on the
device, and gradients are scaled in place. Delete when Megatron uses torch's foreach functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads


def l2_norm(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Sequence[Sequence[torch.Tensor]], per_tensor: bool,
            *args) -> tuple[torch.Tensor, None]:
    """fp32 [1], the norm of all tensors together. Arguments and result as amp_C.multi_tensor_l2norm has them."""
    norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None


def scale(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Sequence[list[torch.Tensor]], factor: float) -> None:
    """Multiplies tensors in place; source and destination are the same (clip_grad_by_total_norm_fp32)."""
    source, destination = tensor_lists
    assert all(one is other for one, other in zip(source, destination, strict=True))
    torch._foreach_mul_(destination, factor)


def use_foreach() -> None:
    """From here on Megatron's fallbacks are the functions above. With Transformer Engine or Apex nothing changes."""
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = l2_norm, scale
