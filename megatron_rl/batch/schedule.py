"""Lengths -> (data-parallel rank, micro-batch) of every sequence. Pure: no tensors, no groups, deterministic.

Invariants, each tested: every sequence appears exactly once; all ranks get the same number of micro-batches
(collectives must match), a multiple of `multiple_of`; no micro-batch exceeds the token cap; the most expensive
rank is close to the mean. A micro-batch may be empty when there are fewer sequences than places.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def plan_microbatches(lengths: Sequence[int], *, dp_size: int, tokens_per_microbatch: int,
                      min_microbatches: int = 1, multiple_of: int = 1,
                      attention_tokens: float = 6.0 * 2048) -> list[list[list[int]]]:
    """plan[rank][micro-batch] = indices into `lengths` (tokens of each sequence).

    Cost of a sequence of L tokens: L * (1 + L / attention_tokens), linear work plus causal attention, where
    attention_tokens is the length at which both weigh the same (about 6 * hidden size). Longest first into the
    cheapest micro-batch that has room; the count grows until all fit.
    Raises ValueError if one sequence alone exceeds the cap.
    """
    longest = max(lengths, default=0)
    if longest > tokens_per_microbatch:
        raise ValueError(f"a sequence of {longest} tokens exceeds batch.tokens_per_microbatch={tokens_per_microbatch}")
    per_rank = max(min_microbatches, math.ceil(sum(lengths) / (dp_size * tokens_per_microbatch)))
    costs = [length * (1.0 + length / attention_tokens) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while True:
        per_rank = math.ceil(per_rank / multiple_of) * multiple_of
        bins = _fill(order, lengths, costs, dp_size * per_rank, tokens_per_microbatch)
        if bins is not None:
            return _deal(bins, costs, dp_size, per_rank)
        per_rank += 1


def _fill(order, lengths, costs, num_bins: int, cap: int) -> list[list[int]] | None:
    """Longest first, each into the cheapest bin with room; None if some sequence finds no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens = [0] * num_bins
    heap = [(0.0, i) for i in range(num_bins)]
    for index in order:
        full = []
        while heap and tokens[heap[0][1]] + lengths[index] > cap:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, chosen = heapq.heappop(heap)
        bins[chosen].append(index)
        tokens[chosen] += lengths[index]
        heapq.heappush(heap, (cost + costs[index], chosen))
        for entry in full:
            heapq.heappush(heap, entry)
    return bins


def _deal(bins: list[list[int]], costs, dp_size: int, per_rank: int) -> list[list[list[int]]]:
    """Micro-batches to ranks in snake order of cost, so that ranks run equal work at the same time."""
    ranked = sorted(bins, key=lambda members: (-sum(costs[i] for i in members), members))
    plan: list[list[list[int]]] = [[] for _ in range(dp_size)]
    for row in range(per_rank):
        group = ranked[row * dp_size:(row + 1) * dp_size]
        for rank, members in enumerate(group if row % 2 == 0 else reversed(group)):
            plan[rank].append(sorted(members))
    return plan
