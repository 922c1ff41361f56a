"""Exact duplicates by normalised text; near ones by MinHash (datasketch 2.0.0), each proven by its true similarity.

Problems that differ in a number are different problems, however alike their texts: "3 apples" is not "4 apples".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from datasketch import MinHash, MinHashLSH

from megatron_rl.data.curation.items import Item, Removal, Split, problem_text, words

__all__ = ["dedup"]

SHINGLE = 5
PERMUTATIONS = 128
_NUMBER = re.compile(r"\d+")


def dedup(items: Sequence[Item], *, threshold: float = 0.7, same_numbers: bool = True) -> Split:
    """The first of each set of duplicates stays. `threshold`: Jaccard similarity of 5-character shingles, in (0, 1].

    same_numbers False: near-duplicates may differ in their numbers. The detail of a removal names the problem that
    stays, the similarity, and whether the answers differ: then one of them is wrong.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must lie in (0, 1]")
    removed: dict[int, Removal] = {}
    first: dict[str, int] = {}
    shingles: dict[int, frozenset[str]] = {}
    numbers = [sorted(_NUMBER.findall(problem_text(item.problem))) for item in items]
    # Candidates below the threshold are dropped by their true similarity, so the index may be generous.
    index = MinHashLSH(threshold=max(0.1, threshold - 0.15), num_perm=PERMUTATIONS, weights=(0.2, 0.8))
    for place, item in enumerate(items):
        text = " ".join(words(problem_text(item.problem)))
        if text in first:
            removed[place] = _removal("exact_duplicate", items, first[text], item)
            continue
        first[text] = place
        own, sketch = _shingles(text), MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([piece.encode() for piece in own])
        alike = [(_jaccard(own, shingles[other]), -other) for other in index.query(sketch)
                 if not same_numbers or numbers[other] == numbers[place]]
        best, other = max(alike, default=(0.0, 0))
        if best >= threshold:
            removed[place] = _removal("near_duplicate", items, -other, item, f", similarity {best:.2f}")
            continue
        shingles[place] = own
        index.insert(place, sketch)
    return Split(items, removed)


def _removal(why: str, items: Sequence[Item], kept: int, item: Item, more: str = "") -> Removal:
    stays = items[kept]
    answers = (stays.problem.answer.strip(), item.problem.answer.strip())
    differ = "" if answers[0] == answers[1] else f"; answers differ: {answers[0]!r} there, {answers[1]!r} here"
    return Removal(why, f"of {stays.problem.id} ({stays.row.where}){more}{differ}")


def _shingles(text: str) -> frozenset[str]:
    return frozenset(text[i:i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1)))


def _jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    return len(left & right) / len(left | right)
