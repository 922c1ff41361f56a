"""An asynchronous client of SGLang's HTTP API (0.5.23: sglang/srt/entrypoints/http_server.py).

Weight versions are integers on our side and str(n) on the wire.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from megatron_rl.config.schema import Config
from megatron_rl.rollout.connection import EngineHTTPError, JsonConnection, well_formed
from megatron_rl.rollout.engine_command import engine_key
from megatron_rl.rollout.routed_experts import RoutedLayers
from megatron_rl.rollout.sampling import GenerateResult, SamplingParams, read_result

ABORT_TIMEOUT_S = 5.0


class EngineClient:
    """One engine at `base_url`. Safe for many concurrent calls on one event loop.

    timeout_s: for slow calls: generation, moving weights, checksums. control_timeout_s: for all others.
    The connection pool opens on first use and belongs to that event loop. close() or `async with` ends it; after that
    another loop may use the client. Every call raises EngineHTTPError.
    """

    def __init__(self, base_url: str, *, timeout_s: float = 600.0, control_timeout_s: float = 60.0,
                 api_key: str | None = None):
        self._connection = JsonConnection(base_url, api_key)
        self.base_url = self._connection.base_url
        self.timeout_s = timeout_s
        self.control_timeout_s = control_timeout_s
        self.adapter: str | None = None
        """The loaded adapter that every request is to be answered with (rollout.publish=adapter)."""

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._connection.close()

    async def generate(
        self, input_ids: Sequence[int], *, rid: str, sampling: SamplingParams, timeout_s: float | None = None,
        routed_layers: RoutedLayers | None = None,
    ) -> GenerateResult:
        """Samples one response to `input_ids`. A finish of ABORT is an answer, not an error.

        routed_layers: also ask for the experts that every token took (an engine with --enable-return-routed-experts).
        """
        asked = {
            "rid": rid,
            "input_ids": list(input_ids),
            "sampling_params": sampling.to_wire(),
            "return_logprob": True,
            "return_routed_experts": routed_layers is not None,
            **self._beside_weights(),
        }
        parse = partial(read_result, prompt_tokens=len(input_ids), routed_layers=routed_layers)
        return await self._connection.read("POST", "/generate", asked, parse,
                                           timeout_s=self.timeout_s if timeout_s is None else timeout_s)

    async def is_healthy(self, *, timeout_s: float = 5.0) -> bool:
        """True if the engine has started and its scheduler has answered recently."""
        try:
            await self._request("GET", "/health", None, timeout_s=timeout_s)
        except EngineHTTPError:
            return False
        return True

    async def input_logprobs(self, input_ids: Sequence[int], *, rid: str) -> np.ndarray:
        """Log-probability of each token but the first, given those before it, fp32 [L - 1], at temperature 1."""
        meta = await self._read_input(input_ids, rid, {})
        with well_formed():
            return _finite(rid, [pair[0] for pair in meta["input_token_logprobs"][1:]])

    async def top_input_logprobs(self, input_ids: Sequence[int], *, rid: str,
                                 top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """The top_k most probable tokens at each place but the first, given those before it, at temperature 1.

        Returns (log-probabilities fp32 [L - 1, k], token ids int32 [L - 1, k]).
        """
        meta = await self._read_input(input_ids, rid, {"top_logprobs_num": top_k})
        with well_formed():
            rows = meta["input_top_logprobs"][1:]
            shape = (len(input_ids) - 1, top_k)
            return (_finite(rid, [[logprob for logprob, _, _ in row] for row in rows]).reshape(shape),
                    np.asarray([[token for _, token, _ in row] for row in rows], np.int32).reshape(shape))

    async def _read_input(self, input_ids: Sequence[int], rid: str, more: dict[str, Any]) -> dict[str, Any]:
        """meta_info of a request that the engine reads and answers with one token."""
        answer = await self._post(
            "/generate",
            {
                "rid": rid,
                "input_ids": list(input_ids),
                "sampling_params": {"temperature": 1.0, "max_new_tokens": 1},
                "return_logprob": True,
                "logprob_start_len": 0,
                **self._beside_weights(),
                **more,
            },
            timeout_s=self.timeout_s,
        )
        with well_formed():
            meta = answer["meta_info"]
            if [pair[1] for pair in meta["input_token_logprobs"][1:]] != list(input_ids[1:]):
                raise EngineHTTPError(f"POST /generate: request {rid} has log-probabilities of other tokens than asked")
            return meta

    async def detokenize(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each sequence by the engine's own tokenizer, special tokens included."""
        answer = await self._post("/detokenize", {"tokens": [list(each) for each in token_ids],
                                                  "skip_special_tokens": False}, timeout_s=self.timeout_s)
        with well_formed():
            return [str(text) for text in answer["text"]]

    async def weight_version(self, *, timeout_s: float | None = None) -> int | None:
        """The version of the last publish that reached its end; None if the engine's label is not a number."""
        info = await self._request("GET", "/model_info", None, timeout_s=timeout_s)
        with well_formed():
            label = info["weight_version"]
            return int(label) if re.fullmatch(r"-?\d+", label) else None

    async def waiting_requests(self, *, timeout_s: float | None = None) -> int:
        """Requests that the engine has accepted and does not work on yet, over its data-parallel ranks."""
        answer = await self._request("GET", "/v1/loads?include=core", None, timeout_s=timeout_s)
        with well_formed():
            return sum(int(load["num_waiting_reqs"]) for load in answer["loads"])

    async def server_info(self) -> dict[str, Any]:
        return await self._request("GET", "/server_info", None)

    async def pause_generation(self, mode: Literal["abort", "in_place", "retract"]) -> None:
        """abort: running requests end with Finish.ABORT; the others continue after continue_generation().

        in_place keeps the key-value cache of the old weights; retract recomputes it.
        """
        await self._post("/pause_generation", {"mode": mode})

    async def continue_generation(self) -> None:
        await self._post("/continue_generation", {})

    async def abort(self, rid: str) -> None:
        await self._post("/abort_request", {"rid": rid}, timeout_s=ABORT_TIMEOUT_S)

    async def flush_cache(self) -> None:
        """Drops the prefix cache. The engine refuses while requests run, except while it is paused with `retract`."""
        await self._post("/flush_cache", None)

    async def release_memory_occupation(self, tags: Sequence[str]) -> None:
        """Releases memory of these kinds, with its contents. The server dies if a request runs (sync/memory.py)."""
        await self._post("/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory_occupation(self, tags: Sequence[str]) -> None:
        await self._post("/resume_memory_occupation", {"tags": list(tags)})

    async def checksums(self) -> list[dict[str, str]]:
        """Per engine rank: parameter name -> 16 hex digits, computed from the weights in use."""
        answer = await self._post("/weights_checker", {"action": "checksum"}, timeout_s=self.timeout_s)
        return [dict(rank["checksums"]) for rank in answer["ranks"]]

    async def begin_weight_update(self) -> None:
        await self._post("/begin_weight_update", {})

    async def end_weight_update(self) -> None:
        await self._post("/end_weight_update", {})

    async def update_weights_from_tensor(
        self, serialized_named_tensors: Sequence[str], *, load_format: str | None, flush_cache: bool,
        version: int | None = None,
    ) -> None:
        """Sends one base64 pickle per tensor-parallel rank. Only between begin and end."""
        await self._post(
            "/update_weights_from_tensor",
            {
                "serialized_named_tensors": list(serialized_named_tensors),
                "load_format": load_format,
                "flush_cache": flush_cache,
                **_version_to_wire(version),
            },
            timeout_s=self.timeout_s,
        )

    async def update_weights_from_distributed(
        self, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], *, group_name: str,
        load_format: str | None, flush_cache: bool, version: int | None = None,
    ) -> None:
        """Returns once the broadcast from rank 0 of the group has been received and loaded."""
        await self._post(
            "/update_weights_from_distributed",
            {
                "names": list(names),
                "dtypes": list(dtypes),
                "shapes": [list(shape) for shape in shapes],
                "group_name": group_name,
                "load_format": load_format,
                "flush_cache": flush_cache,
                **_version_to_wire(version),
            },
            timeout_s=self.timeout_s,
        )

    async def update_weights_from_disk(self, model_path: str, *, version: int) -> None:
        await self._post(
            "/update_weights_from_disk",
            {"model_path": model_path, "flush_cache": True, **_version_to_wire(version)},
            timeout_s=self.timeout_s,
        )

    async def adapters(self) -> list[str]:
        """The names of the loaded adapters."""
        answer = await self._request("GET", "/v1/models", None)
        with well_formed():
            return [card["id"] for card in answer["data"] if card["parent"] is not None]

    async def load_adapter(self, name: str, config: Mapping[str, Any], pickled: str, checksums: Mapping[str, str], *,
                           version: int) -> None:
        """config: peft's. pickled: a base64 pickle of {peft name: matrix}. checksums: the SHA-256 of each matrix, which
        the engine compares; it ends if one differs."""
        await self._post("/load_lora_adapter_from_tensors",
                         {"lora_name": name, "config_dict": config, "serialized_named_tensors": [pickled],
                          "expected_checksums": checksums}, timeout_s=self.timeout_s)
        await self.label_weights(version)

    async def label_weights(self, version: int) -> None:
        """Sets what weight_version() returns. The weights stay as they are, and running requests go on."""
        await self._post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    async def unload_adapter(self, name: str) -> None:
        """Returns when the requests that use it have ended."""
        await self._post("/unload_lora_adapter", {"lora_name": name})

    async def init_weights_update_group(
        self, *, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str,
        backend: Literal["gloo", "nccl"],
    ) -> None:
        await self._post(
            "/init_weights_update_group",
            {
                "master_address": master_address,
                "master_port": master_port,
                "rank_offset": rank_offset,
                "world_size": world_size,
                "group_name": group_name,
                "backend": backend,
            },
        )

    async def destroy_weights_update_group(self, group_name: str) -> None:
        await self._post("/destroy_weights_update_group", {"group_name": group_name})

    def _beside_weights(self) -> dict[str, str]:
        return {} if self.adapter is None else {"lora_path": self.adapter}

    async def _post(self, path: str, body: Any, *, timeout_s: float | None = None) -> Any:
        return await self._request("POST", path, body, timeout_s=timeout_s)

    async def _request(self, method: str, path: str, body: Any, *, timeout_s: float | None = None) -> Any:
        return await self._connection.request(
            method, path, body, timeout_s=self.control_timeout_s if timeout_s is None else timeout_s)


def _finite(rid: str, values: list[Any]) -> np.ndarray:
    """float32 of numbers, or of equally long lists of them."""
    logprobs = np.asarray(values, dtype=np.float32)
    if not np.isfinite(logprobs).all():
        raise EngineHTTPError(f"POST /generate: request {rid} has log-probabilities that are not finite")
    return logprobs


def _version_to_wire(version: int | None) -> dict[str, str]:
    return {} if version is None else {"weight_version": str(version)}


def engine_clients(config: Config) -> list[EngineClient]:
    """A client of each engine, for one event loop.

    ValueError if there is no engine, or a named variable holds no key.
    """
    engine = config.rollout.engine
    if not engine.urls:
        raise ValueError("rollout.engine.urls is empty: start through `megatron-rl rl`, which starts an engine, "
                         "or give the URLs of running SGLang servers")
    key = engine_key(engine)
    return [EngineClient(url, timeout_s=config.rollout.request_timeout_s, control_timeout_s=engine.control_timeout_s,
                         api_key=key) for url in engine.urls]
