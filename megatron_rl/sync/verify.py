"""Checks by the engine's own checksums that every engine serves exactly the weights that were sent.

SGLang 0.5.23 hashes each parameter that each tensor-parallel rank holds (sglang/srt/utils/weight_checker.py;
engine_hashes.py has its two hashes). The parameters differ from the checkpoint's: SGLang fuses query, key and value,
and gate and up projections; it stacks experts, pads vocabularies with zeros and on a CPU MLP widths too, and normalises
a NormHead (sglang/srt/models/bailing_moe.py: load_weights). A family's engine_layout says how (model/families/). A rank
holds its share of heads, of MLP widths and of the vocabulary (sglang/srt/layers/linear.py, fused_moe_triton/layer.py,
vocab_parallel_embedding.py: weight_loader). We compute the digests while the tensors stream past, without keeping them.

Engines that spread their model in another way, or quantise it, raise UnpredictableChecksumsError.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_rl.model.adapters import ENGINE_WIDTH
from megatron_rl.model.families import FAMILIES
from megatron_rl.rollout.client import EngineClient
from megatron_rl.sync.engine_hashes import CPUHash, GPUHash

VOCABULARY_MULTIPLE = 64  # sglang/srt/layers/vocab_parallel_embedding.py: DEFAULT_VOCAB_PADDING_SIZE
NORM_HEAD_EPS = 1e-7  # sglang/srt/models/bailing_moe.py: load_weights
NAMES_SHOWN = 8
PLAIN: Mapping[str, Any] = {"ep_size": 1, "dp_size": 1, "pp_size": 1, "quantization": None,
                            "enable_dp_attention": False, "moe_dense_tp_size": None}
"""What an engine must say in /server_info for its checksums to be predicted."""


class WeightMismatchError(RuntimeError):
    """An engine holds other weights than were published; names the parameters."""


class UnpredictableChecksumsError(ValueError):
    """The checksums of this kind of engine cannot be compared with what was sent."""


@dataclass(frozen=True, order=True)
class EngineLayout:
    """Where an engine's parameters lie: device `cpu` or `cuda`, and how many tensor-parallel ranks share them."""

    device: str = "cpu"
    tp: int = 1

    def __str__(self) -> str:
        return f"{self.device} tp={self.tp}"


def layout_of(info: Mapping[str, Any], url: str) -> EngineLayout:
    """From an engine's /server_info. UnpredictableChecksumsError for one that we cannot predict."""
    other = {key: info[key] for key, value in PLAIN.items() if key in info and info[key] != value}
    if other or info["device"] not in ("cpu", "cuda"):
        raise UnpredictableChecksumsError(
            f"engine {url} runs on {', '.join([info['device'], *(f'{key}={value}' for key, value in other.items())])}: "
            "its checksums cannot be predicted; set rollout.verify_checksums=null or false")
    return EngineLayout(info["device"], info.get("tp_size", 1))


@dataclass
class _Parameter:
    """One engine parameter of one rank while its parts arrive. Parts are hashed in the order of their places."""

    places: int
    hash: CPUHash | GPUHash
    next_place: int = 0
    waiting: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, place: int, tensor: torch.Tensor) -> None:
        self.waiting[place] = tensor
        while self.next_place in self.waiting:
            self.hash.update(self.waiting.pop(self.next_place))
            self.next_place += 1


class ExpectedChecksums:
    """The digests that the ranks of an engine must report for the tensors that were last watched.

    config: the fields of model.network.Network. engine_dtype: what the engine converts weights to; an expert bias is
    float32 in any case, and so are the router's weights if config says router_dtype=fp32.
    """

    def __init__(self, config: Mapping[str, Any], *, engine_dtype: torch.dtype, layout: EngineLayout | None = None):
        self._config, self._layout = config, layout or EngineLayout()
        self._family = FAMILIES[config["model_type"]]
        self._rules = self._family.engine_layout + (
            self._family.engine_latent_layout if config.get("q_lora_rank") else ())
        names = self._family.names
        (self._head,) = names["output_layer.weight"]
        self._vocabulary = {self._head, *names["embedding.word_embeddings.weight"]}
        self._joint = names.get("self_attention.linear_qkv.weight", ())
        self._queries = (*self._joint, *names.get("self_attention.linear_qkv.bias", ()))
        self._dtype = engine_dtype
        self._in_float32 = tuple(names.get("mlp.router.expert_bias", ()))
        if config.get("router_dtype") == "fp32":
            self._in_float32 += names["mlp.router.weight"]
        self._ranks: list[dict[str, _Parameter]] = []

    def _is_behind(self, name: str) -> bool:
        """Whether the engine's model drops the tensor, which belongs to a layer behind the last (model.mtp)."""
        layer = re.match(self._family.layer_prefix.format(layer=r"(\d+)"), name)
        return layer is not None and int(layer[1]) >= self._config["num_hidden_layers"]

    def watch(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Passes the tensors on unchanged and hashes them.

        Each call starts over: digests() covers these tensors only.
        """
        self._ranks = [{} for _ in range(self._layout.tp)]
        for name, tensor in named_tensors:
            if not self._is_behind(name):
                self._add(name, tensor.detach() if self._layout.device == "cuda" else tensor.detach().cpu())
            yield name, tensor

    def digests(self) -> list[dict[str, str]]:
        """For each rank, parameter -> 16 hex digits. ValueError if parts of a parameter were never seen."""
        for name, parameter in (item for rank in self._ranks for item in rank.items()):
            if parameter.next_place != parameter.places:
                raise ValueError(f"{parameter.places - parameter.next_place} of {parameter.places} tensors that make "
                                 f"up {name} were not published")
        return [{name: parameter.hash.hexdigest() for name, parameter in rank.items()} for rank in self._ranks]

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        if name == self._head and self._config.get("tie_word_embeddings"):
            return
        if name == self._head and self._config.get("norm_head"):
            tensor = torch.nn.functional.normalize(tensor, dim=0, p=2, eps=NORM_HEAD_EPS)
        if name in self._vocabulary:
            tensor = _zero_padded(tensor, 0, _round_up(tensor.shape[0], VOCABULARY_MULTIPLE))
        parameter, place, places, width_dim = self._locate(name)
        if width_dim is not None and self._layout.device == "cpu":
            tensor = _zero_padded(tensor, width_dim, self._engine_width(name))
        tensor = tensor.to(torch.float32 if name.endswith(self._in_float32) else self._dtype)
        hashes = CPUHash if self._layout.device == "cpu" else GPUHash
        for held, piece in zip(self._ranks, self._pieces(name, tensor, width_dim), strict=True):
            held.setdefault(parameter, _Parameter(places, hashes())).add(place, piece)
            if parameter.endswith(".mlp.gate.weight") and not self._config["num_shared_experts"]:
                for empty in self._family.zero_width:
                    held[parameter.removesuffix("gate.weight") + empty] = _Parameter(0, hashes())

    def _pieces(self, name: str, tensor: torch.Tensor, width_dim: int | None) -> list[torch.Tensor]:
        """What each tensor-parallel rank holds of a whole tensor."""
        tp = self._layout.tp
        if tp == 1:
            return [tensor]
        if name in self._vocabulary:
            return _cut(tensor, tp, 0)
        if width_dim is not None:
            return _cut(tensor, tp, width_dim)
        if name.endswith(tuple(self._family.names["self_attention.linear_proj.weight"])):
            return _cut(tensor, tp, 1)
        if name.endswith(self._queries):
            return self._heads(name, tensor, tp)
        return [tensor] * tp

    def _heads(self, name: str, tensor: torch.Tensor, tp: int) -> list[torch.Tensor]:
        """Query, key and value, in one tensor or one of them; with fewer key heads than ranks several hold the same."""
        size = self._config["head_dim"]
        heads, groups = (self._config[key] for key in ("num_attention_heads", "num_key_value_heads"))
        queries, keys = heads * size, groups * size

        def shared_out(part: torch.Tensor) -> list[torch.Tensor]:
            if groups < tp:
                return [each for each in _cut(part, groups, 0) for _ in range(tp // groups)]
            return _cut(part, tp, 0)

        if len(self._joint) == 1:
            query, key, value = tensor.split([queries, keys, keys])
            return [torch.cat(parts) for parts in zip(_cut(query, tp, 0), shared_out(key), shared_out(value),
                                                      strict=True)]
        return _cut(tensor, tp, 0) if "q_proj" in name else shared_out(tensor)

    def _locate(self, name: str) -> tuple[str, int, int, int | None]:
        """(engine parameter, place of this tensor in it, number of places, dimension of the MLP's width)."""
        for pattern, parameter, (parts, part), width_dim in self._rules:
            if match := re.fullmatch(pattern, name):
                found = match.groupdict()
                if "expert" not in found:
                    return parameter.format(**found), part, parts, width_dim
                place = int(found["expert"]) * parts + part
                return parameter.format(**found), place, self._config["num_experts"] * parts, width_dim
        return name, 0, 1, None

    def _engine_width(self, name: str) -> int:
        """The width of an expert, of all shared experts together, or of a dense layer, on a CPU."""
        multiple = ENGINE_WIDTH * self._layout.tp
        expert_width = _round_up(self._config["moe_intermediate_size"], multiple)
        if ".mlp.experts." in name:
            return expert_width
        if ".mlp.shared_expert" in name:
            own_width = self._config.get("shared_expert_intermediate_size", 0)
            return (_round_up(own_width, multiple) or expert_width) * self._config["num_shared_experts"]
        return _round_up(self._config["intermediate_size"], multiple)


def predictable(config: Mapping[str, Any], layout: EngineLayout) -> bool:
    """Whether we know how so many ranks share this network: not with latent attention, and only even shares."""
    if layout.tp == 1:
        return True
    groups, tp = config["num_key_value_heads"], layout.tp
    even = [config["num_attention_heads"], VOCABULARY_MULTIPLE, config["intermediate_size"],
            config["moe_intermediate_size"], config.get("shared_expert_intermediate_size", 0), max(groups, tp)]
    return not config.get("kv_lora_rank") and all(size % tp == 0 for size in even) and max(groups, tp) % groups == 0


def _cut(tensor: torch.Tensor, parts: int, dim: int) -> list[torch.Tensor]:
    assert tensor.shape[dim] % parts == 0, (tensor.shape, parts)  # `predictable`
    return list(tensor.chunk(parts, dim))


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


async def verify_engine(client: EngineClient, digests: Sequence[Mapping[str, str]], *,
                        leave_out: Iterable[str] = ()) -> None:
    """Asks one engine for its checksums, rank by rank, but for the parameters `leave_out`.

    Raises WeightMismatchError.
    """
    ranks, left_out = await client.checksums(), set(leave_out)
    if len(ranks) != len(digests):
        raise WeightMismatchError(f"engine {client.base_url} reports {len(ranks)} tensor-parallel ranks, not "
                                  f"{len(digests)}")
    for number, (expected, reported) in enumerate(zip(digests, ranks, strict=True)):
        compare_checksums({name: digest for name, digest in expected.items() if name not in left_out},
                          {name: digest for name, digest in reported.items() if name not in left_out},
                          client.base_url + (f" (tensor-parallel rank {number})" if len(ranks) > 1 else ""))


async def unproven(client: EngineClient, digests: Sequence[Mapping[str, str]]) -> set[str]:
    """Parameters whose checksum differs on some rank, or that one side alone has."""
    return {name for expected, reported in zip(digests, await client.checksums(), strict=False)
            for name in expected.keys() | reported.keys() if expected.get(name) != reported.get(name)}


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
