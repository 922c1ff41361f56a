"""Decontamination: problems that share too many word n-grams with a benchmark's."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from megatron_rl.data.curation.items import Item, Removal, Split, problem_text, words
from megatron_rl.data.problems import Problem

__all__ = ["decontaminate"]

MIN_WORDS = 3


def decontaminate(items: Sequence[Item], benchmarks: Iterable[Problem], *, ngram: int = 10,
                  share: float = 0.5) -> Split:
    """Removes a problem that shares at least `share` of the n-grams of the shorter of it and some benchmark problem.

    That is share of the benchmark's text found in the problem, or the other way round. A benchmark problem of fewer
    than `ngram` words counts as one n-gram; below 3 words it is not looked for.
    """
    if ngram < 1 or not 0 < share <= 1:
        raise ValueError(f"ngram={ngram} must be at least 1, and share={share} must lie in (0, 1]")
    owners: dict[int, dict[tuple[str, ...], set[int]]] = defaultdict(lambda: defaultdict(set))
    known: list[tuple[str, int]] = []  # id and number of distinct n-grams of each benchmark problem
    for problem in benchmarks:
        text = words(problem_text(problem))
        if len(text) < MIN_WORDS:
            continue
        length = min(ngram, len(text))
        grams = _ngrams(text, length)
        for gram in grams:
            owners[length][gram].add(len(known))
        known.append((problem.id, len(grams)))
    removed = {}
    for place, item in enumerate(items):
        text = words(problem_text(item.problem))
        shared, own = Counter(), {}
        for length, owner in owners.items():
            own[length] = _ngrams(text, length)
            for gram in own[length] & owner.keys():
                for number in owner[gram]:
                    shared[number, length] += 1
        overlap, (number, _) = max(((count / min(known[key[0]][1], len(own[key[1]])), key)
                                    for key, count in shared.items()), default=(0.0, (0, 0)))
        if overlap >= share:
            removed[place] = Removal("contaminated", f"{overlap:.2f} of {known[number][0]}")
    return Split(items, removed)


def _ngrams(text: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(text[i:i + length]) for i in range(len(text) - length + 1)}
