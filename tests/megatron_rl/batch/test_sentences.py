"""Sentences are spans of the sampled tokens: exact for any tokenizer, and the same for every prefix of a response."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from c3po import BudgetSelection
from megatron_rl.batch import StepBatch, pack, with_sentences
from megatron_rl.batch.sentences import sentence_ids
from megatron_rl.config.schema import AlgoConfig
from megatron_rl.handoff.shard import UpdateShard, read_shard, write_shard
from megatron_rl.model.tokenizer import QuickText
from megatron_rl.types import TrainSample

END = re.compile(AlgoConfig().sentence_end)


def numbered(*pieces: str, mask=None) -> list[int]:
    """Sentences of tokens that complete these texts."""
    ids = np.arange(len(pieces))
    mask = np.ones(len(pieces), dtype=bool) if mask is None else np.array(mask, dtype=bool)
    return sentence_ids(ids, mask, lambda part: [pieces[i] for i in part], END).tolist()


@pytest.mark.parametrize(("pieces", "expected"), [
    (["So", " x", "=", "3", ".", "14", ".", " Then", " y", "!"], [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]),  # 3.14 is one number
    (["Why", "?\n\n", "Be", "cause", " it", " is", ".", "\n", "\n", "Done"], [0, 0, 1, 1, 1, 1, 1, 1, 1, 2]),
    (["He", " said", ' "no', '."', " He", " left", ".)"], [0, 0, 0, 0, 1, 1, 1]),
    (["\u597d", "\u3002", "\u5bf9", "\uff01\u662f", "\u5417"], [0, 0, 1, 1, 2]),  # a token that goes on after the end
    (["a", ".", "", ""], [0, 0, 0, 0]),  # the stop token has no text
    (["", "a", " b"], [0, 0, 0]),
    (["", ""], [0, 0]),
    (["x", ";", " y"], [0, 0, 1]),
    (["...", " so"], [0, 1]),
    (["A", ". ", "B!"], [0, 0, 1]),  # the last token is a sentence
    (["\u597d\u3002", "\u5bf9\u3002", "\u5417\u3002"], [0, 1, 2]),
])
def test_sentences_by_hand(pieces, expected):
    assert numbered(*pieces) == expected


def test_a_given_stretch_ends_a_sentence_and_carries_no_number():
    mask = [0, 1, 1, 0, 0, 1, 1, 1]
    assert numbered("p.", "a", "b", "tool.", " c", "d", ".", " e", mask=mask) == [0, 0, 0, 0, 0, 1, 1, 2]


def byte_tokens() -> PreTrainedTokenizerFast:
    """One token for each byte, and some of two that begin and end inside of characters."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    words = [*letters.values(), *(letters[0xe3] + letters[0x80], letters[0x80] + letters[0x82])]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece_tokens() -> PreTrainedTokenizerFast:
    """Llama's decoder: a word's space is a mark, and the first one is left out; bytes are tokens of their own."""
    words = ["\u2581a", "\u2581b.", "c", ".", "!", "\u2581", "\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [byte_tokens, sentencepiece_tokens])
def test_the_pieces_of_a_text_are_the_text_also_where_tokens_cut_characters(make):
    tokenizer = make()
    quick, rng = QuickText(tokenizer), np.random.default_rng(0)
    text = "Ja. \u597d\u3002 \u00e9t\u00e9! \U0001f600\n"
    utf8 = [len(tokenizer) - 256 + byte if make is sentencepiece_tokens else tokenizer.convert_tokens_to_ids(word)
            for byte, word in zip(text.encode(), _letters(text), strict=True)]
    for ids in (utf8, *(rng.permutation(utf8[:4]).tolist() + utf8 for _ in range(20)), [0, 1, 0, 2, 3, 0, 6]):
        pieces = quick.pieces(ids)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) and len(pieces) == len(ids)
        assert all(quick.pieces(ids[:end])[:-1] == pieces[:end][:-1] for end in range(len(ids)))
    assert quick.pieces(utf8)[4:7] == ["", "", "\u597d"]
    assert quick.pieces([]) == []


def _letters(text: str) -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[byte] for byte in text.encode()]


def test_the_sentences_of_a_cut_response_are_those_of_the_whole():
    tokenizer = byte_tokens()
    quick = QuickText(tokenizer)
    text = 'First 3.5 steps. Then "more"! \u597d\u3002\u5bf9\n\nLast; or not? No'
    ids = np.array(tokenizer.convert_tokens_to_ids(_letters(text)))
    whole = sentence_ids(ids, np.ones(len(ids), dtype=bool), quick.pieces, END)
    assert whole.max() == 6 and (np.diff(whole) >= 0).all()
    for end in range(1, len(ids)):
        cut = sentence_ids(ids[:end], np.ones(end, dtype=bool), quick.pieces, END)
        assert cut.tolist() == whole[:end].tolist()


def samples() -> list[TrainSample]:
    found = []
    for index, length in enumerate((6, 3, 5)):
        mask = np.arange(length) >= 1 + index % 2
        found.append(TrainSample(index, np.arange(length, dtype=np.int32), mask, np.zeros(length, np.float32), 1.0,
                                 int(mask.sum())))
    return found


def test_numbers_reach_the_packed_microbatch_apart_for_every_sequence():
    batch = StepBatch(tuple(samples()), BudgetSelection(torch.tensor([5, 1, 4]), 10, 10), 3, 10)
    # token 3 is " d.": texts of ids 0 .. 5
    pieces = ["a", " b", " c", " d.", " e", " f"]
    (marked,) = with_sentences([batch], lambda ids: [pieces[i] for i in ids], AlgoConfig().sentence_end)
    assert [sample.sentences.tolist() for sample in marked.samples] == [
        [0, 0, 0, 0, 1, 1], [0, 0, 0], [0, 0, 0, 0, 1]]
    shard = UpdateShard(marked.samples, (3,), (0,), 10, 10, 3)
    ((read,), plain) = read_shard(write_shard([shard])), replace(batch.samples[0])
    packed = pack(read.samples, multiple_of=4)
    assert packed.sentence_ids.tolist() == [0, 0, 0, 1, 1, 0, 2, 3, 3, 3, 4, 0]
    assert packed.sentence_ids[packed.loss_mask].tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 4]
    assert pack([plain], multiple_of=4).sentence_ids is None
    assert pack([], multiple_of=4).sentence_ids.tolist() == [0, 0, 0, 0], "an empty micro-batch has no sentence to lack"
