"""An answer of /generate becomes arrays with every number as it was sent, or an error that says what is wrong."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest

from megatron_rl.rollout.connection import EngineHTTPError
from megatron_rl.rollout.sampling import read_result
from megatron_rl.types import Finish, VersionSpan


def answer(ids: list[int], logprobs: list[float], **changed: Any) -> dict[str, Any]:
    """As SGLang 0.5.23 answers (managers/tokenizer_manager.py), with keys of meta_info that are read and others."""
    meta = {"id": "r", "finish_reason": {"type": "stop", "matched": 7}, "prompt_tokens": 3, "weight_version": "4",
            "input_token_logprobs": [], "output_token_logprobs_length": len(ids), "completion_tokens": len(ids),
            "output_token_logprobs": [[p, token, None] for p, token in zip(logprobs, ids, strict=True)],
            "weight_versions": [{"version": "3", "start": 0, "end": 0}, {"version": "4", "start": 0, "end": len(ids)}],
            "cached_tokens": 2, "num_retractions": 1, "dp_rank": None, "e2e_latency": 0.5}
    return {"text": "a \"[1,null]\" b \u00e9 \\", "output_ids": ids, "meta_info": {**meta, **changed}}


def drawn(count: int) -> tuple[list[int], list[float]]:
    rng = np.random.default_rng(count)
    return rng.integers(0, 150_000, count).tolist(), (-rng.exponential(2.0, count)).astype(np.float32).tolist()


@pytest.mark.parametrize("count", [0, 1, 2, 4096])
@pytest.mark.parametrize("encode", [orjson.dumps, lambda value: json.dumps(value).encode(),
                                    lambda value: json.dumps(value, indent=1).encode()],
                         ids=["compact", "spaces", "lines"])
def test_every_number_arrives_as_it_was_sent(count, encode):
    ids, logprobs = drawn(count)
    result = read_result(encode(answer(ids, logprobs)))
    assert (result.output_ids.dtype, result.logprobs.dtype) == (np.int32, np.float32)
    assert result.output_ids.tolist() == ids
    assert result.logprobs.tolist() == logprobs  # float32 numbers in, the same ones out
    assert result.weight_versions == ((VersionSpan(4, 0, count),) if count else ())
    assert (result.finish, result.cached_tokens, result.num_retractions) == (Finish.STOP, 2, 1)
    assert result.finish_detail == {"type": "stop", "matched": 7}


def test_a_token_may_have_its_text():
    ids, logprobs = drawn(300)
    texts = [[p, token, "x"] for p, token in zip(logprobs, ids, strict=True)]
    result = read_result(orjson.dumps(answer(ids, logprobs, output_token_logprobs=texts)))
    assert (result.output_ids.tolist(), result.logprobs.tolist()) == (ids, logprobs)


IDS, LOGPROBS = drawn(3)
PAIRS = [[p, token, None] for p, token in zip(LOGPROBS, IDS, strict=True)]
WHOLE = orjson.dumps(answer(IDS, LOGPROBS))


@pytest.mark.parametrize(("body", "said"), [
    (orjson.dumps(answer(IDS, LOGPROBS, output_token_logprobs=PAIRS[:-1])), "2 log-probabilities for 3 tokens"),
    (orjson.dumps(answer(IDS, LOGPROBS, output_token_logprobs=[PAIRS[1], PAIRS[0], PAIRS[2]])), "not of the same"),
    (orjson.dumps(answer(IDS, LOGPROBS, output_token_logprobs=[pair[:1] for pair in PAIRS])), "malformed|not of"),
    (orjson.dumps(answer(IDS, LOGPROBS, output_token_logprobs=[[None, *pair[1:]] for pair in PAIRS])), "not finite"),
    (orjson.dumps(answer(IDS, [LOGPROBS[0], float("nan"), LOGPROBS[2]])), "not finite"),
    (orjson.dumps(answer(IDS, LOGPROBS, output_token_logprobs={})), "malformed|0 log-probabilities"),
    (orjson.dumps(answer(IDS, LOGPROBS, output_token_logprobs={"a": 1})), "malformed"),
    (orjson.dumps(answer(IDS, LOGPROBS, output_token_logprobs=None)), "malformed"),
    (orjson.dumps(answer(IDS, [-1e300] * 3)), "not finite"),
    (orjson.dumps(answer([-1, 2, 3], LOGPROBS)), "negative token id"),
    (orjson.dumps(answer([1, 2, 1 << 40], LOGPROBS)), "negative token id"),
    (orjson.dumps(answer(IDS, LOGPROBS, finish_reason=None)), "malformed"),
    (orjson.dumps(answer(IDS, LOGPROBS, finish_reason={"type": "tired"})), "malformed"),
    (orjson.dumps(answer(IDS, LOGPROBS, weight_versions=3)), "malformed"),
    (orjson.dumps(answer(IDS, LOGPROBS, weight_versions=[{"version": "x", "start": 0, "end": 3}])), "malformed"),
    (orjson.dumps({"output_ids": IDS}), "malformed"),
    (orjson.dumps([1, 2]), "malformed"), (orjson.dumps("text"), "malformed"), (b"7", "malformed"),
    (WHOLE[:-1], "malformed"), (WHOLE[:len(WHOLE) // 2], "malformed"), (b"", "malformed"),
    (b"<html>bad gateway</html>", "it answered .<html>bad gateway"), (b"\xff\xfe", "malformed"),
])
def test_what_is_not_whole_is_refused(body, said):
    with pytest.raises(EngineHTTPError, match=said):
        read_result(body)
