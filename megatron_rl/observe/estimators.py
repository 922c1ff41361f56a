"""What n judged samples of a problem say about drawing k of them: pass@k and majority voting."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

__all__ = ["majority_at_k", "pass_at_k", "sample_counts"]

VOTE_DRAWS = 200


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k samples, drawn without replacement from n of which c are right, hold a right one.

    1 - C(n-c, k) / C(n, k), the unbiased estimator of arXiv 2107.03374 Eq. 1. ValueError for impossible numbers.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples, {c} of them right: 0 <= c <= n and 1 <= k <= n must hold")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_at_k(votes: Sequence[str | None], k: int, *, right: str, seed: int = 0) -> float:
    """Probability that `right` wins the vote of k samples drawn without replacement from `votes`.

    A vote of None is not counted; answers that are level share the win. Exact for k = n; otherwise the mean over
    200 draws from `seed`.
    """
    if not 1 <= k <= len(votes):
        raise ValueError(f"maj@{k} of {len(votes)} samples")
    if k == len(votes):
        return _wins(votes, right)
    generator = np.random.default_rng(seed)
    drawn = (generator.choice(len(votes), size=k, replace=False) for _ in range(VOTE_DRAWS))
    return float(np.mean([_wins([votes[i] for i in places], right) for places in drawn]))


def _wins(votes: Sequence[str | None], right: str) -> float:
    counts = Counter(vote for vote in votes if vote is not None)
    most = max(counts.values(), default=0)
    winners = [answer for answer, count in counts.items() if count == most]
    return 1.0 / len(winners) if right in winners else 0.0


def sample_counts(n: int) -> list[int]:
    """The k for which n samples are reported: 1, 2, 4, ... and n."""
    return sorted({1 << i for i in range(n.bit_length()) if 1 << i <= n} | {n})
