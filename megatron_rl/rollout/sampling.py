"""How a response is sampled, and what comes back (sglang/srt/managers/io_struct.py: GenerateReqInput)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import simdjson

from megatron_rl.rollout.connection import EngineHTTPError, well_formed
from megatron_rl.rollout.routed_experts import RoutedLayers
from megatron_rl.types import Finish, VersionSpan


@dataclass(frozen=True)
class SamplingParams:
    """How one response is sampled.

    seed takes effect on engines that were started with rollout.engine.deterministic; SGLang otherwise ignores it. A
    stop string stays in output_ids as it was sampled.
    """

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def with_seed(self, seed: int) -> SamplingParams:
        return replace(self, seed=seed)

    def to_wire(self) -> dict[str, Any]:
        wire: dict[str, Any] = {
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
        if self.seed is not None:
            wire["sampling_seed"] = self.seed
        if self.stop:
            wire["stop"] = list(self.stop)
        if self.stop_token_ids:
            wire["stop_token_ids"] = list(self.stop_token_ids)
        if self.ignore_eos:
            wire["ignore_eos"] = True
        return wire


@dataclass(frozen=True)
class GenerateResult:
    """One response: R sampled tokens.

    - output_ids: int32 [R].
    - logprobs: fp32 [R], of the temperature-scaled distribution before top-p and top-k.
    - finish_detail: the engine's own finish_reason.
    - routed_experts: uint8 [tokens - 1, M, topk] if asked for. It covers the whole sequence except its last token,
      which no layer has read.
    """

    output_ids: np.ndarray
    logprobs: np.ndarray
    finish: Finish
    finish_detail: Mapping[str, Any]
    weight_versions: tuple[VersionSpan, ...]
    cached_tokens: int
    num_retractions: int
    routed_experts: np.ndarray | None = None


def read_result(body: bytes, *, prompt_tokens: int = 0, routed_layers: RoutedLayers | None = None) -> GenerateResult:
    """Reads an answer of /generate without a Python object per token, since tokens are most of what a step moves.

    prompt_tokens, routed_layers: of the request, if it asked for the experts that its tokens took. EngineHTTPError if
    the answer is not whole: no JSON, lost, unequal or non-finite tokens, or other experts than can be.
    """
    with well_formed(body):
        return _read(simdjson.Parser().parse(_with_numbers(body)), prompt_tokens, routed_layers)


def _with_numbers(body: bytes) -> bytes | bytearray:
    """The answer with " 0  " for each null of its log-probabilities.

    [log-probability, token id, null] becomes an array of numbers, which can be copied out as it is. Letters from "l" on
    lose all bits but those of 0x30; numbers have no such letter. The answer stays as it is if a text stands among them,
    or if they have not one null for each token: a log-probability that is no number is null too.
    """
    name = b'"output_token_logprobs":'
    begin = body.find(name) + len(name)
    end = body.rfind(b"]]", begin)
    if begin < len(name) or end < 0 or body.find(b'"', begin, end) >= 0:
        return body
    changed = bytearray(body)
    letters = np.frombuffer(changed, np.uint8)[begin:end]
    kept = (letters >= ord("l")).view(np.uint8)
    if np.count_nonzero(kept) != len("null") * (1 + np.count_nonzero(letters == ord("]"))):
        return body
    kept *= 0xFF - 0x30
    np.invert(kept, out=kept)
    letters &= kept
    return changed


def _read(answer: simdjson.Object, prompt_tokens: int, routed_layers: RoutedLayers | None) -> GenerateResult:
    meta = answer["meta_info"]
    output_ids = _numbers(answer["output_ids"], "i", np.int64)
    pairs = _pairs(meta["output_token_logprobs"]) if len(output_ids) else np.zeros((0, 2))
    if not np.array_equal(pairs[:, 1], output_ids):
        raise EngineHTTPError(f"POST /generate: {len(pairs)} log-probabilities for {len(output_ids)} tokens "
                              f"of request {meta['id']}, or not of the same tokens")
    if len(output_ids) and not 0 <= output_ids.min() <= output_ids.max() <= np.iinfo(np.int32).max:
        raise EngineHTTPError(f"POST /generate: request {meta['id']} has a negative token id, or one above 2**31: "
                              f"{output_ids.min()} to {output_ids.max()}")
    with np.errstate(over="ignore"):
        logprobs = pairs[:, 0].astype(np.float32)
    if not np.isfinite(logprobs).all():
        raise EngineHTTPError(f"POST /generate: request {meta['id']} has log-probabilities that are not finite")
    reason = _plain(meta["finish_reason"])
    finish = Finish(reason["type"])
    experts = None
    if routed_layers is not None and finish is not Finish.ABORT:
        experts = _experts(meta, routed_layers, prompt_tokens + len(output_ids))
    spans = tuple(
        VersionSpan(version=int(span["version"]), start=span["start"], end=span["end"])
        for span in _plain(meta["weight_versions"])
        if span["end"] > span["start"]
    )
    if [0, *(span.end for span in spans)] != [*(span.start for span in spans), len(output_ids)]:
        raise EngineHTTPError(f"POST /generate: request {meta['id']} has versions of the weights for other tokens than "
                              f"its {len(output_ids)}: {_plain(meta['weight_versions'])}")
    return GenerateResult(
        output_ids=output_ids.astype(np.int32),
        logprobs=logprobs,
        finish=finish,
        finish_detail=reason,
        weight_versions=spans,
        cached_tokens=meta["cached_tokens"],
        num_retractions=meta["num_retractions"],
        routed_experts=experts,
    )


def _pairs(entries: simdjson.Array) -> np.ndarray:
    """(log-probability, token id) of each entry, float64 [R, 2]."""
    try:
        return _numbers(entries, "d", np.float64).reshape(-1, 3)[:, :2]
    except TypeError:  # a third part that is no number: a token's text
        return np.array([[entry[0], entry[1]] for entry in _plain(entries)], dtype=np.float64)


def _numbers(array: simdjson.Array, kind: Literal["i", "d"], dtype: type) -> np.ndarray:
    """A flat copy of an array of numbers, or of arrays of them. TypeError if anything else is in it."""
    if not isinstance(array, simdjson.Array):
        raise TypeError(f"{type(array).__name__} instead of an array")
    return np.frombuffer(array.as_buffer(of_type=kind), dtype=dtype) if len(array) else np.zeros(0, dtype)


def _plain(value: Any) -> Any:
    """The Python value of a small part of the answer."""
    if isinstance(value, simdjson.Object):
        return value.as_dict()
    return value.as_list() if isinstance(value, simdjson.Array) else value


def _experts(meta: simdjson.Object, layers: RoutedLayers, num_tokens: int) -> np.ndarray:
    if "routed_experts" not in meta or meta["routed_experts"] is None:
        raise EngineHTTPError("POST /generate: no routed_experts in the answer; algo.router_replay=rollout needs an "
                              "SGLang server that was started with --enable-return-routed-experts")
    return layers.decode(meta["routed_experts"], num_tokens=num_tokens)
