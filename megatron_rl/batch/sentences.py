"""Which sentence each response token belongs to, for algo.loss.surrogate=lpo (Ling 2.0, arXiv 2510.22115).

The text is split, and the tokens keep their ids: a sentence is a span of the tokens that were sampled. Nothing is
tokenised again. Letters: L tokens of a sequence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from megatron_rl.batch.assemble import StepBatch

Pieces = Callable[[np.ndarray], list[str]]
"""Token ids -> the text that each of them completes; joined, they are the text of all (model.tokenizer.QuickText)."""


def with_sentences(batches: Sequence[StepBatch], pieces: Pieces, sentence_end: str) -> list[StepBatch]:
    """The batches with TrainSample.sentences. sentence_end: algo.sentence_end."""
    ends = re.compile(sentence_end)
    return [replace(batch, samples=tuple(
        replace(sample, sentences=sentence_ids(sample.token_ids, sample.loss_mask, pieces, ends))
        for sample in batch.samples)) for batch in batches]


def sentence_ids(token_ids: np.ndarray, loss_mask: np.ndarray, pieces: Pieces, ends: re.Pattern[str]) -> np.ndarray:
    """The number of its sentence at each token where loss_mask is True, 0 elsewhere; int32 [L], dense from 0.

    A sentence ends with the token that holds the last character of a match of `ends`, also if the token goes on after
    it. Tokens that were given (a tool's answer) end one too. A token without text after the last sentence, such as the
    stop token, belongs to that sentence.
    """
    numbers, first = np.zeros(len(token_ids), dtype=np.int32), 0
    edges = np.flatnonzero(np.diff(loss_mask.astype(np.int8), prepend=0, append=0))
    for begin, end in edges.reshape(-1, 2).tolist():
        numbers[begin:end] = first + _sentences_of_text(pieces(token_ids[begin:end]), ends)
        first = int(numbers[end - 1]) + 1
    return numbers


def _sentences_of_text(pieces: Sequence[str], ends: re.Pattern[str]) -> np.ndarray:
    text_ends_L = np.cumsum([len(piece) for piece in pieces])
    # the token that holds character e - 1 is the first whose text ends at or behind e
    last_L = np.searchsorted(text_ends_L, [match.end() for match in ends.finditer("".join(pieces)) if match.group()])
    begins_L = np.zeros(len(pieces) + 1, dtype=np.int32)  # one more: behind the last token nothing begins
    begins_L[last_L + 1] = 1
    numbers_L = begins_L[:-1].cumsum()
    with_text = int(np.searchsorted(text_ends_L, text_ends_L[-1]))  # the last token that has some
    return np.minimum(numbers_L, numbers_L[with_text])
