"""Lengths -> (data-parallel rank, micro-batch) of every sequence. Pure: no tensors, no groups, deterministic.

Invariants, each tested:

- Every sequence appears exactly once.
- All ranks get the same number of micro-batches (collectives must match), a multiple of `multiple_of`.
- No micro-batch exceeds the token cap, alignment padding included.
- The most expensive rank is close to the mean.

A micro-batch is empty if there are fewer sequences than places.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from megatron_rl.batch.pack import microbatch_multiple, packed_tokens, sequence_multiple


def plan_microbatches(lengths: Sequence[int], *, dp_size: int, tokens_per_microbatch: int, cp_size: int = 1,
                      align: int = 1, min_microbatches: int = 1, multiple_of: int = 1,
                      attention_tokens: float = 6.0 * 2048) -> list[list[list[int]]]:
    """plan[data-parallel rank][micro-batch] = indices into `lengths` (positions of each sequence).

    tokens_per_microbatch caps the positions on one rank. The cp_size ranks of a context-parallel group share a sequence
    evenly, so together they hold cp_size times as many. align: T on a rank is padded to a multiple of it.

    A sequence of L positions, padding included, costs L * (1 + L / attention_tokens): linear work plus causal
    attention. attention_tokens is the length at which both cost the same (observe/flops.py has the network's). The
    longest sequence goes first, into the cheapest micro-batch that has room; the number of micro-batches grows until
    all fit. Then the micro-batches are dealt in rows of one per rank, the most expensive first, and the most expensive
    of a row goes to the rank that has least so far. ValueError if one sequence alone exceeds the cap.
    """
    each, unit = sequence_multiple(cp_size), microbatch_multiple(cp_size, align)
    padded = [math.ceil(length / each) * each for length in lengths]
    cap = tokens_per_microbatch * cp_size // unit * unit
    if max(padded, default=0) > cap:
        over_cp = f" x parallel.cp={cp_size}" if cp_size > 1 else ""
        raise ValueError(f"a sequence of {max(lengths)} tokens exceeds "
                         f"batch.tokens_per_microbatch={tokens_per_microbatch}{over_cp}")
    per_rank = max(min_microbatches, math.ceil(sum(padded) / (dp_size * cap)))
    costs = [length * (1.0 + length / attention_tokens) for length in padded]
    order = sorted(range(len(padded)), key=lambda i: (-padded[i], i))
    while True:
        per_rank = math.ceil(per_rank / multiple_of) * multiple_of
        bins = _fill(order, padded, costs, dp_size * per_rank, cap)
        if bins is not None:
            return _deal(bins, costs, dp_size, per_rank)
        per_rank += 1


def common_tokens(plan: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], *, multiple_of: int,
                  cp_size: int) -> list[int]:
    """T of each micro-batch, if all ranks need the same T at a time, as with the all-gather token dispatcher."""
    return [max(packed_tokens([lengths[i] for i in members], multiple_of=multiple_of, cp_size=cp_size)
                for members in row) for row in zip(*plan, strict=True)]


def _fill(order, lengths, costs, num_bins: int, cap: int) -> list[list[int]] | None:
    """Longest first, each into the cheapest bin with room; None if some sequence finds no room.

    O(N log N): a bin without room for this length waits in `full`, by its room, until the lengths have come down to it.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [cap] * num_bins
    cheapest = [(0.0, i) for i in range(num_bins)]
    full: list[tuple[int, float, int]] = []
    for index in order:
        length = lengths[index]
        while full and -full[0][0] >= length:
            heapq.heappush(cheapest, heapq.heappop(full)[1:])
        while cheapest and room[cheapest[0][1]] < length:
            cost, chosen = heapq.heappop(cheapest)
            heapq.heappush(full, (-room[chosen], cost, chosen))
        if not cheapest:
            return None
        cost, chosen = cheapest[0]
        bins[chosen].append(index)
        room[chosen] -= length
        heapq.heapreplace(cheapest, (cost + costs[index], chosen))
    return bins


def _deal(bins: list[list[int]], costs, dp_size: int, per_rank: int) -> list[list[list[int]]]:
    """Deals micro-batches to ranks in rows of falling cost, so ranks do equal work at each time and in total."""
    ranked = sorted(((sum(costs[i] for i in members), sorted(members)) for members in bins),
                    key=lambda each: (-each[0], each[1]))
    plan: list[list[list[int]]] = [[] for _ in range(dp_size)]
    totals = [0.0] * dp_size
    for row in range(per_rank):
        least_first = sorted(range(dp_size), key=lambda rank: (totals[rank], rank))
        for rank, (cost, members) in zip(least_first, ranked[row * dp_size:(row + 1) * dp_size], strict=True):
            plan[rank].append(members)
            totals[rank] += cost
    return plan
