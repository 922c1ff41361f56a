"""Decontamination: problems that share too many word n-grams with a benchmark's."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_rl.data.curation.items import Item, Removal, Split, problem_text, words
from megatron_rl.data.problems import Problem

__all__ = ["decontaminate"]

MIN_WORDS, MAX_SENTENCES, MOST = 3, 5, 2 / 3
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+|\n+")


@dataclass(frozen=True)
class _Text:
    """The words of a benchmark problem, and its n-grams: one if it is shorter than that."""

    name: str
    words: tuple[str, ...]
    grams: frozenset[tuple[str, ...]]


def decontaminate(items: Sequence[Item], benchmarks: Iterable[Problem], *, ngram: int = 10,
                  share: float = 0.5) -> Split:
    """Removes a problem that shares at least `share` of its n-grams with a benchmark problem.

    The shorter of the two texts counts: the share is of the benchmark's text found in the problem, or the other way
    round. A text of fewer than two n-grams may be a phrase that many problems have ("What is the area of the shaded
    region?"). It must therefore also make up two thirds of the longer text, or hold a number and be a sentence of the
    problem. A benchmark problem of fewer than `ngram` words counts as one n-gram; below 3 words it is not looked for.
    """
    if ngram < 1 or not 0 < share <= 1:
        raise ValueError(f"ngram={ngram} must be at least 1, and share={share} must lie in (0, 1]")
    owners: dict[int, dict[tuple[str, ...], set[int]]] = defaultdict(lambda: defaultdict(set))
    known: list[_Text] = []
    for problem in benchmarks:
        text = words(problem_text(problem))
        if len(text) < MIN_WORDS:
            continue
        length = min(ngram, len(text))
        grams = _ngrams(text, length)
        for gram in grams:
            owners[length][gram].add(len(known))
        known.append(_Text(problem.id, tuple(text), frozenset(grams)))
    removed = {}
    for place, item in enumerate(items):
        text = words(problem_text(item.problem))
        shared, own = Counter(), {}
        for length, owner in owners.items():
            own[length] = _ngrams(text, length)
            for gram in own[length] & owner.keys():
                for number in owner[gram]:
                    shared[number, length] += 1
        overlaps = sorted(((count / min(len(known[number].grams), len(own[length])), number)
                           for (number, length), count in shared.items()), reverse=True)
        for overlap, number in overlaps:
            if overlap >= share and _is_telling(known[number].words, text, item, 2 * ngram):
                removed[place] = Removal("contaminated", f"{overlap:.2f} of {known[number].name}")
                break
    return Split(items, removed)


def _is_telling(benchmark: Sequence[str], text: Sequence[str], item: Item, enough: int) -> bool:
    """Whether the shared text shows that the two are one problem."""
    shorter, longer = sorted((benchmark, text), key=len)
    if len(shorter) >= enough or len(shorter) >= MOST * len(longer):
        return True
    if not any(character.isdigit() for word in shorter for character in word):
        return False
    sentences = [words(sentence) for sentence in _SENTENCE_END.split(problem_text(item.problem))]
    starts = [place for place, sentence in enumerate(sentences) if sentence and sentence[0] == benchmark[0]]
    return any(list(benchmark) == sum(sentences[first:last], []) for first in starts
               for last in range(first + 1, min(first + MAX_SENTENCES, len(sentences)) + 1))


def _ngrams(text: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(text[i:i + length]) for i in range(len(text) - length + 1)}
