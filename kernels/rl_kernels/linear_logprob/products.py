"""Matrix products of 16-bit factors that are summed in float32 and stay float32: no result is rounded to 16 bits.

A CPU widens the factors, which loses nothing. On a GPU matrix units take 16-bit factors and return float32
(`out_dtype`); a factor that is itself float32 goes in as the sum of two 16-bit parts, which keeps 16 of its bits.
"""

from __future__ import annotations

import torch

__all__ = ["add_product", "math_dtype", "multiply", "parts", "product"]

NARROW = (torch.bfloat16, torch.float16)


def math_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def parts(left: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What add_product takes in turn for `left` beside factors of `dtype`; their sum is `left`."""
    if left.dtype == dtype or not (left.is_cuda and dtype in NARROW):
        return (left,)
    high = left.to(dtype)
    return high, (left - high).to(dtype)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, summed in the dtype of total, which is math_dtype of the factors."""
    if left.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in math_dtype, a buffer of its own. left and right have one dtype."""
    if left.is_cuda and left.dtype in NARROW:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.to(math_dtype(left)) @ right.to(math_dtype(right))


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in math_dtype, a buffer of its own; left may be float32 beside a narrower right."""
    first, *others = parts(left, right.dtype)
    total = product(first, right)
    for part in others:
        add_product(total, part, right)
    return total
