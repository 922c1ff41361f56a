"""Checks by the engine's own checksums that every engine serves exactly the weights that were sent.

SGLang 0.5.23 hashes each parameter it holds: the first 8 bytes of SHA-256 over its raw bytes on CPU
(sglang/srt/utils/weight_checker.py, sglang/srt/managers/mm_utils.py: tensor_hash). Its parameters differ from the
checkpoint's: it fuses query, key and value, and gate and up projections; it stacks experts, pads vocabularies and MLP
widths with zeros, and normalises a NormHead (sglang/srt/models/bailing_moe.py: load_weights). A family's engine_layout
says how (model/families/). We compute the digests while the tensors stream past, without keeping them.

Two kinds of engines are not reproduced, and raise UnpredictableChecksumsError: tensor-parallel engines (each rank
hashes its shard) and CUDA engines (another hash function).
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_rl.model.families import FAMILIES
from megatron_rl.rollout.client import EngineClient

VOCABULARY_MULTIPLE = 64  # sglang/srt/layers/vocab_parallel_embedding.py: DEFAULT_VOCAB_PADDING_SIZE
WIDTH_MULTIPLE = 32  # sglang/srt/configs/update_config.py: adjust_config_with_unaligned_cpu_tp
NORM_HEAD_EPS = 1e-7  # sglang/srt/models/bailing_moe.py: load_weights
NAMES_SHOWN = 8


class WeightMismatchError(RuntimeError):
    """An engine holds other weights than were published; names the parameters."""


class UnpredictableChecksumsError(ValueError):
    """The checksums of this kind of engine cannot be compared with what was sent."""


@dataclass
class _Parameter:
    """One engine parameter while its parts arrive. Parts are hashed in the order of their places."""

    places: int
    sha: Any = field(default_factory=hashlib.sha256)
    next_place: int = 0
    waiting: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, place: int, tensor: torch.Tensor) -> None:
        self.waiting[place] = tensor
        while self.next_place in self.waiting:
            part = self.waiting.pop(self.next_place)
            self.sha.update(memoryview(part.contiguous().flatten().view(torch.uint8).numpy()))
            self.next_place += 1


class ExpectedChecksums:
    """The digests an engine must report for the tensors that were last watched.

    config: the fields of model.network.Network. engine_dtype: what the engine converts weights to; an expert bias is
    float32 in any case, and so are the router's weights if config says router_dtype=fp32.
    """

    def __init__(self, config: Mapping[str, Any], *, engine_dtype: torch.dtype):
        self._config = config
        self._family = FAMILIES[config["model_type"]]
        self._layout = self._family.engine_layout + (
            self._family.engine_latent_layout if config.get("q_lora_rank") else ())
        (self._head,) = self._family.names["output_layer.weight"]
        self._vocabulary = {self._head, *self._family.names["embedding.word_embeddings.weight"]}
        self._dtype = engine_dtype
        self._in_float32 = tuple(self._family.names.get("mlp.router.expert_bias", ()))
        if config.get("router_dtype") == "fp32":
            self._in_float32 += self._family.names["mlp.router.weight"]
        self._parameters: dict[str, _Parameter] = {}

    def _is_behind(self, name: str) -> bool:
        """Whether the engine's model drops the tensor, which belongs to a layer behind the last (model.mtp)."""
        layer = re.match(self._family.layer_prefix.format(layer=r"(\d+)"), name)
        return layer is not None and int(layer[1]) >= self._config["num_hidden_layers"]

    def watch(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Passes the tensors on unchanged and hashes them.

        Each call starts over: digests() covers these tensors only.
        """
        self._parameters = {}
        for name, tensor in named_tensors:
            if not self._is_behind(name):
                self._add(name, tensor.detach().cpu())
            yield name, tensor

    def digests(self) -> dict[str, str]:
        """Engine parameter -> 16 hex digits. ValueError if parts of a parameter were never seen."""
        for name, parameter in self._parameters.items():
            if parameter.next_place != parameter.places:
                raise ValueError(f"{parameter.places - parameter.next_place} of {parameter.places} tensors that make "
                                 f"up {name} were not published")
        return {name: parameter.sha.digest()[:8].hex() for name, parameter in self._parameters.items()}

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        if name == self._head and self._config.get("tie_word_embeddings"):
            return
        if name == self._head and self._config.get("norm_head"):
            tensor = torch.nn.functional.normalize(tensor, dim=0, p=2, eps=NORM_HEAD_EPS)
        if name in self._vocabulary:
            tensor = _zero_padded(tensor, 0, _round_up(tensor.shape[0], VOCABULARY_MULTIPLE))
        parameter, place, places, width_dim = self._locate(name)
        if width_dim is not None:
            tensor = _zero_padded(tensor, width_dim, self._engine_width(name))
        entry = self._parameters.setdefault(parameter, _Parameter(places))
        entry.add(place, tensor.to(torch.float32 if name.endswith(self._in_float32) else self._dtype))
        if parameter.endswith(".mlp.gate.weight") and not self._config["num_shared_experts"]:
            for empty in self._family.zero_width:
                self._parameters[parameter.removesuffix("gate.weight") + empty] = _Parameter(places=0)

    def _locate(self, name: str) -> tuple[str, int, int, int | None]:
        """(engine parameter, place of this tensor in it, number of places, dimension of the MLP's width)."""
        for pattern, parameter, (parts, part), width_dim in self._layout:
            if match := re.fullmatch(pattern, name):
                found = match.groupdict()
                if "expert" not in found:
                    return parameter.format(**found), part, parts, width_dim
                place = int(found["expert"]) * parts + part
                return parameter.format(**found), place, self._config["num_experts"] * parts, width_dim
        return name, 0, 1, None

    def _engine_width(self, name: str) -> int:
        """The width of an expert, of all shared experts together, or of a dense layer."""
        expert_width = _round_up(self._config["moe_intermediate_size"], WIDTH_MULTIPLE)
        if ".mlp.experts." in name:
            return expert_width
        if ".mlp.shared_experts." in name:
            return expert_width * self._config["num_shared_experts"]
        return _round_up(self._config["intermediate_size"], WIDTH_MULTIPLE)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _zero_padded(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def compare_checksums(expected: Mapping[str, str], reported: Mapping[str, str], engine: str) -> None:
    """Raises WeightMismatchError unless both name the same parameters with the same digests."""
    problems = {
        "differ": [name for name, digest in expected.items() if reported.get(name, digest) != digest],
        "were published but the engine has no such parameter": sorted(expected.keys() - reported.keys()),
        "are in the engine but were not published": sorted(reported.keys() - expected.keys()),
    }
    found = [
        f"{len(names)} parameters {problem}: {', '.join(names[:NAMES_SHOWN])}" + (" ..." * (len(names) > NAMES_SHOWN))
        for problem, names in problems.items()
        if names
    ]
    if found:
        raise WeightMismatchError(f"engine {engine} does not serve the published weights; " + "; ".join(found))


async def verify_engine(client: EngineClient, digests: Mapping[str, str]) -> None:
    """Asks one engine for its checksums. Raises WeightMismatchError or UnpredictableChecksumsError."""
    info, ranks = await asyncio.gather(client.server_info(), client.checksums())
    if len(ranks) != 1 or info["device"] != "cpu":
        raise UnpredictableChecksumsError(
            f"engine {client.base_url} runs on {info['device']} with {len(ranks)} tensor-parallel ranks: its "
            "checksums cannot be predicted (only one CPU rank can); set rollout.verify_checksums=null or false")
    compare_checksums(digests, ranks[0], client.base_url)


def verify_engines(clients: Sequence[EngineClient], expected: ExpectedChecksums) -> None:
    """verify_engine for all, for callers without an event loop."""
    digests = expected.digests()

    async def verify_and_close(client: EngineClient) -> None:
        try:
            await verify_engine(client, digests)
        finally:
            await client.close()

    async def verify_all() -> None:
        await asyncio.gather(*(verify_and_close(client) for client in clients))

    asyncio.run(verify_all())
