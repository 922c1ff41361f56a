"""The tokenizer of a model's folder."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import decoders

from megatron_rl.compat.quick_imports import quick_imports
from megatron_rl.config.schema import ModelConfig
from megatron_rl.model.hf_folder import refuse_code


def load_tokenizer(model: ModelConfig):
    """The tokenizer of the Hugging Face folder model.path; the model's own class is not needed for it."""
    folder = model.path
    refuse_code(folder, trusted=model.trust_remote_code)
    with quick_imports():  # here, because ranks other than 0 have no use for it, and it is slow
        from transformers.utils import logging

    logging.set_verbosity_error()  # it has no class for a bailing_moe, and says so in every process
    try:
        with quick_imports():
            kind = _class_of(Path(folder))
        return kind.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (ValueError, OSError) as error:
        files = sorted(path.name for path in Path(folder).glob("*token*"))
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"model.path={folder}: no tokenizer can be read there (files: {', '.join(files) or 'none'}); "
                         f"copy tokenizer.json and tokenizer_config.json into it ({why})") from error


def _class_of(folder: Path) -> type:
    """AutoTokenizer, or the class that it chooses for a bailing_moe without code: its own import takes seconds more."""
    config, options = (json.loads(path.read_text()) if (path := folder / name).is_file() else {}
                       for name in ("config.json", "tokenizer_config.json"))
    plain = options.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    if plain and "auto_map" not in options and config.get("model_type") == "bailing_moe":
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def token_texts(tokenizer) -> list[str]:
    """The text of each token id alone, special tokens included: what a vocabulary is compared by."""
    return [tokenizer.decode([token], skip_special_tokens=False) for token in range(len(tokenizer))]


class QuickText:
    """A Hugging Face tokenizer with a fast decode() for byte-level vocabularies, which all supported models have.

    If the tokenizer's decoder is ByteLevel alone, a text is its tokens' bytes end to end, and decode() copies them out
    of one table, eight at a time. For any other decoder, and for token ids beyond the vocabulary, it asks the
    tokenizer. Both ways give the same text.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        table = _bytes_of_tokens(tokenizer)
        self._is_quick, self._size = table is not None, len(table or ())
        self._table = table or []
        self._words = np.array([-(-len(each) // 8) for each in self._table], dtype=np.int64)
        self._begins = np.cumsum(self._words) - self._words
        # The end of a token's last word is filled with 0xFF. A token that has that byte itself gets 0xFE, since neither
        # is ever a part of UTF-8: each becomes one replacement character.
        self._bytes = np.frombuffer(b"".join(
            each.replace(b"\xff", b"\xfe").ljust(8 * words, b"\xff")
            for each, words in zip(self._table, self._words.tolist(), strict=True)), dtype=np.uint64)

    def decode(self, token_ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool) -> str:
        ids = np.asarray(token_ids, dtype=np.int64)
        if not self._is_quick or not skip_special_tokens or (len(ids) and ids.max() >= self._size):
            return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        words = self._words.take(ids)
        # word i of the text is word (its token's begin in the table - its token's begin in the text + i) of the table
        places = (self._begins.take(ids) - np.cumsum(words) + words).repeat(words)
        places += np.arange(len(places))
        return self._bytes.take(places).tobytes().translate(None, b"\xff").decode(errors="replace")

    def pieces(self, token_ids: Sequence[int] | np.ndarray) -> list[str]:
        """The text that each token completes, "" if it ends inside of a character; joined, they are the whole text.

        Special tokens have no text. A token that adds a character's last byte gets the character. The last token gets
        the replacement characters of one that is not whole.
        """
        ids = np.asarray(token_ids, dtype=np.int64)
        if self._is_quick and not (len(ids) and ids.max() >= self._size):
            stream = codecs.getincrementaldecoder("utf-8")(errors="replace")
            texts = [stream.decode(self._table[token_id]) for token_id in ids.tolist()]
            rest = stream.decode(b"", final=True)
        else:
            steps = decoders.DecodeStream(skip_special_tokens=True)
            texts = [steps.step(self._tokenizer.backend_tokenizer, token_id) or "" for token_id in ids.tolist()]
            told = max((place + 1 for place, text in enumerate(texts) if text), default=0)
            rest = self._tokenizer.decode(ids[told:].tolist(), skip_special_tokens=True)
        return [*texts[:-1], texts[-1] + rest] if texts else []

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _bytes_of_tokens(tokenizer) -> list[bytes] | None:
    """The bytes of each token id, empty for special tokens and for ids without a token; None for other vocabularies.

    As tokenizers does it (src/pre_tokenizers/byte_level.rs, `decode_chain`): each character of a token stands for one
    byte, but a token that has any other character is text as it is.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.clean_up_tokenization_spaces:
        return None
    kind = type(tokenizer)
    if (kind.decode, kind._decode) != (PreTrainedTokenizerFast.decode, PreTrainedTokenizerFast._decode):
        return None
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (1 + max(tokens.values(), default=-1))
    for token, token_id in tokens.items():
        known = all(character in byte_of for character in token)
        table[token_id] = bytes(byte_of[character] for character in token) if known else token.encode()
    for token_id, added in backend.get_added_tokens_decoder().items():
        if added.special:
            table[token_id] = b""
    return table
