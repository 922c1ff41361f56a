"""An engine that costs nothing: answers of SGLang 0.5.23's shape and of a step's lengths, cut from ready bytes.

`with StubProcess(tokenizer_file, lengths) as stub:` serves in a process of its own. The tokens of a response are a
stretch of one ring of random tokens; its place, its length and its boxed answer follow from the request's seed. Only
bytes are joined for an answer, so the stub takes a small part of the time of whoever reads it.
"""

from __future__ import annotations

import itertools
import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np
import orjson
from aiohttp import web
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.stub_engine import StubEngine

RING_TOKENS = 1 << 16
LETTERS = 256
"""Tokens of one byte, which come first."""
EOS = "<|endoftext|>"


def make_tokenizer(vocabulary: int, seed: int = 0) -> Tokenizer:
    """Byte-level, as the models' own are, with words of random letters. EOS is its last token."""
    rng = np.random.default_rng(seed)
    words = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    while len(words) < vocabulary - 1:
        letters = "".join(map(chr, rng.integers(ord("a"), ord("z") + 1, rng.integers(2, 8))))
        words.setdefault(letters if rng.random() < 0.4 else f"\u0120{letters}", len(words))  # \u0120: a space before it
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    return tokenizer


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths of responses, at most what the request allows. median: in tokens; spread: sigma."""

    median: float
    spread: float

    def of(self, rng: np.random.Generator, limit: int) -> int:
        return int(np.clip(self.median * np.exp(self.spread * rng.normal()), 32, limit))


class _Ring:
    """Pieces of JSON of one token after the other, laid end to end twice, so that any stretch is one slice."""

    def __init__(self, pieces: list[bytes]):
        self._bytes = b"".join(pieces) * 2
        self._begins = [0, *itertools.accumulate(map(len, pieces * 2))]

    def stretch(self, begin: int, count: int) -> bytes:
        return self._bytes[self._begins[begin]:self._begins[begin + count]]


class ScaleStub(StubEngine):
    """tests/stub_engine.py, with answers that are made of ready bytes. Weights are never published to it."""

    def __init__(self, tokenizer: Tokenizer, lengths: Lengths):
        super().__init__(tokenizer.get_vocab_size())
        self.label, self._lengths, self._tokenizer = 0, lengths, tokenizer
        rng = np.random.default_rng(1)
        words = self._vocabulary - 1 - LETTERS
        tokens = (LETTERS + words ** rng.random(RING_TOKENS)).astype(int).tolist()  # by Zipf's law, as in texts
        logprobs = (-rng.exponential(0.5, RING_TOKENS)).astype(np.float32).tolist()
        texts = [tokenizer.decode([token]) for token in tokens]
        self._ids = _Ring([b"%d," % token for token in tokens])
        self._pairs = _Ring([orjson.dumps([logprob, token, None]) + b","
                             for logprob, token in zip(logprobs, tokens, strict=True)])
        self._text = _Ring([orjson.dumps(text)[1:-1] for text in texts])

    async def _generate(self, request: web.Request) -> web.Response:
        asked = orjson.loads(await request.read())
        return web.Response(body=self._body(asked), content_type="application/json")

    def _body(self, asked: dict[str, Any]) -> bytes:
        sampling, prompt_tokens = asked["sampling_params"], len(asked["input_ids"])
        rng = np.random.default_rng(sampling["sampling_seed"])
        limit = sampling["max_new_tokens"]
        count = self._lengths.of(rng, limit)
        answer = f"\\boxed{{0.{rng.integers(10**6):06d}}}"
        last = [*self._tokenizer.encode(answer).ids, self._tokenizer.token_to_id(EOS)]
        begin, body_tokens = int(rng.integers(RING_TOKENS)), count - len(last)
        finish = {"type": "length", "length": limit} if count == limit else {"type": "stop", "matched": last[-1]}
        meta = {"id": asked["rid"], "finish_reason": finish, "prompt_tokens": prompt_tokens, "weight_version": "0",
                "num_retractions": 0, "reasoning_tokens": 0, "completion_tokens": count, "cached_tokens": 0,
                "weight_versions": [{"version": "0", "start": 0, "end": count}], "dp_rank": None, "e2e_latency": 60.0,
                "input_token_logprobs": [], "output_token_logprobs_length": count}
        return b"".join([
            b'{"text":"', self._text.stretch(begin, body_tokens), orjson.dumps(answer)[1:-1],
            b'","output_ids":[', self._ids.stretch(begin, body_tokens), orjson.dumps(last)[1:-1],
            b'],"meta_info":{"output_token_logprobs":[', self._pairs.stretch(begin, body_tokens),
            orjson.dumps([[-0.25, token, None] for token in last])[1:-1], b"],", orjson.dumps(meta)[1:], b"}"])


def _serve(tokenizer_file: str, lengths: Lengths, ready: Connection) -> None:
    with ScaleStub(Tokenizer.from_file(tokenizer_file), lengths) as stub:
        ready.send(stub.url)
        ready.recv()  # until the other end is closed, or says so


class StubProcess:
    """`with StubProcess(tokenizer_file, lengths) as stub:` then stub.url."""

    def __init__(self, tokenizer_file: Path, lengths: Lengths):
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(str(tokenizer_file), lengths, there), daemon=True)
        self.url = ""

    def __enter__(self) -> Self:
        self._process.start()
        self.url = self._here.recv()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._here.send(None)
        self._process.join()
