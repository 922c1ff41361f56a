"""Who stands where, by arithmetic: a rank's coordinates, the groups that it is in, and which ranks differ at all.

Megatron's order of ranks (initialize_model_parallel, megatron-core 0.19.2): tp-cp-ep-dp-pp, the first the fastest;
experts have their own grid, etp-ep-dp within each pipeline stage.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from megatron_rl.config.schema import ParallelConfig


@dataclass(frozen=True)
class Coordinates:
    """A rank's place in two grids: dense parameters (tp, cp, dp, pp) and experts (etp, ep, edp)."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


@functools.cache
def coordinates(rank: int, parallel: ParallelConfig) -> Coordinates:
    per_stage = parallel.world_size // parallel.pp
    stage, place = divmod(rank, per_stage)
    dense, expert = divmod(place, parallel.tp), divmod(place, parallel.etp)
    return Coordinates(tp=dense[1], cp=dense[0] % parallel.cp, dp=dense[0] // parallel.cp, pp=stage,
                       etp=expert[1], ep=expert[0] % parallel.ep, edp=expert[0] // parallel.ep)


GROUPS = {"tp": ("cp", "dp", "pp"), "cp": ("tp", "dp", "pp"), "dp": ("tp", "cp", "pp"), "dp-cp": ("tp", "pp"),
          "tp-cp": ("dp", "pp"), "tp-dp-cp": ("pp",), "pp": ("tp", "cp", "dp"), "etp": ("ep", "edp", "pp"),
          "ep": ("etp", "edp", "pp"), "etp-ep": ("edp", "pp"), "expert-dp": ("etp", "ep", "pp")}
"""Name of a group -> the coordinates that its ranks share."""


@functools.cache
def group_name(ranks: tuple[int, ...], parallel: ParallelConfig) -> str:
    """All names of groups that are exactly `ranks`, with slashes between; `world` for all; `pp` also for two stages of
    one pipeline; their number otherwise."""
    if len(ranks) == parallel.world_size:
        return "world"
    first, found = coordinates(ranks[0], parallel), []
    everyone = [coordinates(rank, parallel) for rank in range(parallel.world_size)]
    for name, shared in GROUPS.items():
        members = tuple(rank for rank, each in enumerate(everyone)
                        if all(getattr(each, axis) == getattr(first, axis) for axis in shared))
        if members == tuple(sorted(ranks)):
            found.append(name)
    if not found and all(dataclasses.replace(coordinates(rank, parallel), pp=first.pp) == first for rank in ranks):
        return "pp"
    return "/".join(found) or f"{len(ranks)} ranks"


def distinct_ranks(parallel: ParallelConfig) -> list[int]:
    """The lowest rank of each pipeline stage and context-parallel rank: with balanced experts all others repeat one.

    (The last data-parallel rank may own a little less of the optimiser's state than the others.)
    """
    lowest: dict[tuple[int, int], int] = {}
    for rank in range(parallel.world_size):
        here = coordinates(rank, parallel)
        lowest.setdefault((here.pp, here.cp), rank)
    return sorted(lowest.values())


def check_rank(rank: int, parallel: ParallelConfig) -> None:
    if not 0 <= rank < parallel.world_size:
        raise ValueError(f"rank={rank}: parallel.world_size={parallel.world_size} has the ranks 0 to "
                         f"{parallel.world_size - 1}")
