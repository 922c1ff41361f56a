"""Which response tokens enter this optimiser step: the training-token budget Phi, before any forward pass.

Letters: N = prompts * responses per prompt, the responses of the whole step over all ranks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["BudgetSelection", "select_within_budget", "selection_order"]


@dataclass(frozen=True)
class BudgetSelection:
    """How many leading tokens of each response carry loss. kept_tokens_N int64 [N], in the order of the input.

    selected_tokens is their total. phi is the budget that was asked for; it stays the divisor of the loss even if
    selected_tokens differs from it.
    """

    kept_tokens_N: torch.Tensor
    selected_tokens: int
    phi: int


def select_within_budget(response_lengths_N: torch.Tensor, order_N: torch.Tensor, *, phi: int,
                         cutoff: Literal["token", "response"] = "token") -> BudgetSelection:
    """Take responses in order_N until the cumulative token count reaches phi (arXiv 2506.14731 Eq. 3, Fig. 3).

    response_lengths_N integer [N], loss-carrying tokens of each response; order_N integer [N], a permutation
    of range(N). cutoff "token" cuts the last response so that exactly phi tokens remain (Eq. 2, Fig. 3);
    "response" keeps it whole (Eq. 3). An exact hit takes no further response. With too few tokens all are
    kept and selected_tokens < phi.
    ValueError: phi < 1, unknown cutoff, negative or fractional lengths, or order_N not a permutation.
    """
    lengths = _integers("response_lengths_N", response_lengths_N)
    order = _integers("order_N", order_N)
    if phi < 1:
        raise ValueError(f"phi={phi} must be at least 1 token")
    if cutoff not in ("token", "response"):
        raise ValueError(f"cutoff={cutoff!r} must be 'token' or 'response'")
    if bool((lengths < 0).any()):
        raise ValueError("response_lengths_N holds a negative length")
    if not torch.equal(order.sort().values, torch.arange(lengths.numel(), device=order.device)):
        raise ValueError(f"order_N must be a permutation of range({lengths.numel()})")

    taken = lengths[order]
    tokens_before = taken.cumsum(0) - taken
    room = (phi - tokens_before).clamp(min=0)
    kept_in_order = torch.minimum(taken, room) if cutoff == "token" else torch.where(room > 0, taken, 0)
    kept = torch.empty_like(lengths)
    kept[order] = kept_in_order
    return BudgetSelection(kept, int(kept.sum()), phi)


def selection_order(num_responses: int, *, seed: int, step: int) -> torch.Tensor:
    """The permutation in which a step's responses are taken, int64 [num_responses] on the CPU.

    It depends on (seed, step) alone, so every rank gets the same one. It does not depend on lengths, because an order
    by length would bias the choice. The pair is hashed for two reasons: torch's CPU generator uses 32 bits of its seed,
    and seed + step would repeat one run's orders in the next.
    """
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=4).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest, "little"))
    return torch.randperm(num_responses, generator=generator)


def _integers(name: str, values: torch.Tensor) -> torch.Tensor:
    if values.dim() != 1 or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(f"{name} must be a vector of integers, not {values.dtype} of shape {tuple(values.shape)}")
    return values.long()
