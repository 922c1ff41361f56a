"""The quick text of token ids is the tokenizer's own, to the character."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_rl.config.schema import ModelConfig
from megatron_rl.model.tokenizer import QuickText, load_tokenizer
from tests.tiny_models import write_tiny_bailing

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
ADDED = ["<think>", "<\uff5cuser\u2581says\uff5c>", "two words", "\u00e9t\u00e9", "\u0120"]
"""Added tokens that are text: with characters that stand for bytes, with others, with both, and a lone space's."""


def byte_level(decoder=None) -> PreTrainedTokenizerFast:
    """All bytes, and words of several bytes that end and begin inside of characters."""
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(2, 5, 2000), *range(5, 40)]
    words = dict.fromkeys([*ALPHABET, *("".join(rng.choice(ALPHABET, length)) for length in lengths)])
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel() if decoder is None else decoder
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.add_tokens([AddedToken(text) for text in ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def sequences(size: int) -> list[list[int]]:
    """Every token alone, and many together; most are no valid UTF-8."""
    rng = np.random.default_rng(1)
    return [[], *([token] for token in range(size)), *(rng.integers(0, size, 40).tolist() for _ in range(3000))]


def test_text_equals_the_tokenizers_own_also_where_bytes_are_no_characters():
    tokenizer = byte_level()
    quick = QuickText(tokenizer)
    ids = sequences(len(tokenizer))
    wanted = [tokenizer.decode(each, skip_special_tokens=True) for each in ids]
    assert [quick.decode(each, skip_special_tokens=True) for each in ids] == wanted
    assert any("\ufffd" in text for text in wanted) and any("\u2581says" in text for text in wanted)


def test_the_table_is_in_use_and_special_tokens_are_asked_for_elsewhere(monkeypatch):
    tokenizer = byte_level()
    quick, eos = QuickText(tokenizer), tokenizer.eos_token_id
    assert quick.decode([eos, 65, eos], skip_special_tokens=False).count("<eos>") == 2
    wanted = tokenizer.decode([65, eos, 66], skip_special_tokens=True)
    monkeypatch.setattr(tokenizer, "decode", None)
    assert quick.decode([65, eos, 66], skip_special_tokens=True) == wanted


def test_ids_beyond_the_vocabulary_are_left_out_as_the_tokenizer_does():
    tokenizer = byte_level()
    ids = [70, len(tokenizer) + 7, 71]
    assert QuickText(tokenizer).decode(ids, skip_special_tokens=True) == tokenizer.decode([70, 71])


@pytest.mark.parametrize("tokenizer", [
    byte_level(decoders.Metaspace()), byte_level(decoders.Sequence([decoders.ByteLevel(), decoders.Strip("a", 1, 1)])),
    byte_level(decoders.WordPiece())], ids=["metaspace", "sequence", "wordpiece"])
def test_another_kind_of_tokenizer_decodes_itself(tokenizer):
    rng, quick = np.random.default_rng(2), QuickText(tokenizer)
    ids = [rng.integers(0, len(tokenizer), 20).tolist() for _ in range(200)]
    assert [quick.decode(each, skip_special_tokens=True) for each in ids] == [
        tokenizer.decode(each, skip_special_tokens=True) for each in ids]


@pytest.mark.parametrize("said", [
    {}, {"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "PreTrainedTokenizerFast"},
    {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "Qwen2TokenizerFast"}, {"model_type": "qwen3_moe"},
    {"model_type": "deepseek_v3", "tokenizer_class": "PreTrainedTokenizerFast"}], ids=str)
def test_the_tokenizer_of_a_folder_is_the_one_that_transformers_chooses(said, tmp_path):
    folder = write_tiny_bailing(tmp_path / "model")
    for name in ("config.json", "tokenizer_config.json"):
        chosen = {key: value for key, value in said.items() if (key == "model_type") == (name == "config.json")}
        options = json.loads((folder / name).read_text())
        options.pop("tokenizer_class", None)
        (folder / name).write_text(json.dumps(options | chosen))
    ours, theirs = load_tokenizer(ModelConfig(path=str(folder))), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    text = "1+2=\n<think> caf\u00e9"
    assert ours.encode(text) == theirs.encode(text) and ours.special_tokens_map == theirs.special_tokens_map
