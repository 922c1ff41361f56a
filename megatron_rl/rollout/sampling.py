"""How a response is sampled, and what comes back (sglang/srt/managers/io_struct.py: GenerateReqInput)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_rl.rollout.connection import EngineHTTPError, well_formed
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


def read_result(answer: Mapping[str, Any]) -> GenerateResult:
    """Reads an answer of /generate. EngineHTTPError if it is not complete, or not what the API says."""
    with well_formed():
        return _read(answer)


def _read(answer: Mapping[str, Any]) -> GenerateResult:
    meta = answer["meta_info"]
    output_ids = np.asarray(answer["output_ids"], dtype=np.int32)
    pairs = meta["output_token_logprobs"] if len(output_ids) else []
    if [pair[1] for pair in pairs] != output_ids.tolist():
        raise EngineHTTPError(f"POST /generate: {len(pairs)} log-probabilities for {len(output_ids)} tokens "
                              f"of request {meta['id']}, or not of the same tokens")
    logprobs = np.asarray([pair[0] for pair in pairs], dtype=np.float32)
    if (output_ids < 0).any():
        raise EngineHTTPError(f"POST /generate: request {meta['id']} has a negative token id: {output_ids.min()}")
    if not np.isfinite(logprobs).all():
        raise EngineHTTPError(f"POST /generate: request {meta['id']} has log-probabilities that are not finite")
    spans = tuple(
        VersionSpan(version=int(span["version"]), start=span["start"], end=span["end"])
        for span in meta["weight_versions"]
        if span["end"] > span["start"]
    )
    if [0, *(span.end for span in spans)] != [*(span.start for span in spans), len(output_ids)]:
        raise EngineHTTPError(f"POST /generate: request {meta['id']} has versions of the weights for other tokens than "
                              f"its {len(output_ids)}: {meta['weight_versions']}")
    reason = meta["finish_reason"]
    return GenerateResult(
        output_ids=output_ids,
        logprobs=logprobs,
        finish=Finish(reason["type"]),
        finish_detail=reason,
        weight_versions=spans,
        cached_tokens=meta["cached_tokens"],
        num_retractions=meta["num_retractions"],
    )
