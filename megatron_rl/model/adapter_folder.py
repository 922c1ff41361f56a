"""Adapters as a folder that peft loads, and the identity of the weights that they belong to. No megatron here.

    adapter_model.safetensors   base_model.model.MODULE.lora_A.weight and .lora_B.weight of every module
    adapter_config.json         peft's LoraConfig
    megatron_rl.json            model.lora as it was, and the base: its path and the digest of `base_of`

Query, key and value (gate and up) have the same lora_A here, as they share it in training; so have the experts of a
layer with model.lora.experts=shared_outer.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_rl.config.load import read_json
from megatron_rl.config.lora import LoraConfig
from megatron_rl.config.rules import require
from megatron_rl.config.schema import ModelConfig
from megatron_rl.model.adapters import adapter_slots, initial, matrix_slots
from megatron_rl.model.families import FAMILIES
from megatron_rl.model.hf_folder import DTYPES, HFReader, atomic_folder, check_place, open_tensors, save_tensors
from megatron_rl.model.network import FREE_KEYS, Network

ADAPTER_FOLDER = "adapter"
"""Beside `hf` in run.dir, with model.lora."""
TENSORS, PEFT_CONFIG, ABOUT = "adapter_model.safetensors", "adapter_config.json", "megatron_rl.json"
SHAPE_KEYS = ("rank", "alpha", "targets", "experts")
"""What must be the same for adapters to fit into others."""
_PREFIX = "base_model.model."
_SAMPLE = 4096


@functools.cache
def base_of(folder: str) -> dict[str, str]:
    """{"path": of the weights that adapters stand beside, "sha256": of what they are}.

    The digest covers config.json but for FREE_KEYS, each weight file's header (names, types, shapes) and the first
    4,096 bytes of every tensor: training changes those of nearly every tensor, and a large model is not read whole.
    """
    raw = read_json(Path(folder) / "config.json")
    network = {key: value for key, value in raw.items() if key not in FREE_KEYS}
    digest = hashlib.sha256(json.dumps(network, sort_keys=True).encode())
    for file in HFReader.files(Path(folder)):
        with file.open("rb") as opened:
            size = opened.read(8)
            header = opened.read(int.from_bytes(size, "little"))
            digest.update(file.name.encode() + header)
            tensors = {name: about for name, about in json.loads(header).items() if name != "__metadata__"}
            for about in sorted(tensors.values(), key=lambda about: about["data_offsets"]):
                start, end = about["data_offsets"]
                opened.seek(8 + len(header) + start)
                digest.update(opened.read(min(_SAMPLE, end - start)))
    return {"path": str(Path(folder).resolve()), "sha256": digest.hexdigest()}


def identity(lora: LoraConfig, path: str) -> dict[str, Any] | None:
    """What adapters must agree on to go on from one another, as JSON; None without adapters."""
    if not lora.on:
        return None
    return {**{key: _plain(getattr(lora, key)) for key in SHAPE_KEYS}, "base": base_of(path)}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, tuple) else value


def check_identity(where: str, there: Mapping[str, Any] | None, here: Mapping[str, Any] | None) -> None:
    """ValueError naming the key in which the adapters `there` (at `where`) are not those that a run has `here`."""
    if there is None and here is None:
        return
    require(there is not None, f"{where} holds all weights, and model.lora.rank={here and here['rank']} trains adapters"
            " alone: set model.lora.rank=0, or choose another run.dir")
    require(here is not None, f"{where} holds adapters alone: set model.lora.rank={there and there['rank']} and the "
            "other keys of model.lora as they were")
    for key in SHAPE_KEYS:
        require(there[key] == here[key], f"model.lora.{key}={_shown(here[key])}, and {where} has {_shown(there[key])}: "
                "set it so")
    require(there["base"]["sha256"] == here["base"]["sha256"],
            f"{where} holds adapters of another base than model.path={here['base']['path']}: they were trained beside "
            f"{there['base']['path']}, whose digest is {there['base']['sha256'][:12]} and not "
            f"{here['base']['sha256'][:12]}; give that one as model.path")


def _shown(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)


def read_adapters(options: ModelConfig, network: Network) -> dict[str, torch.Tensor]:
    """The matrices of the folder model.lora.path under the names of adapters.py, which is checked. ValueError."""
    folder = Path(options.lora.path or "")
    where = f"model.lora.path={folder}"
    for name in (TENSORS, PEFT_CONFIG):
        require((folder / name).is_file(), f"{where}: no {name} there; name a folder that a run with model.lora wrote "
                "(<run.dir>/adapter)")
    require((folder / ABOUT).is_file(), f"{where}: no {ABOUT} there, so another program wrote it: query, key and value "
            "may have a lora_A each there, and here they share one. Merge it into its base, and start from that")
    about = read_json(folder / ABOUT)
    require(isinstance(about, dict) and about.keys() >= {*SHAPE_KEYS, "base"},
            f"{folder / ABOUT} lacks {', '.join(SHAPE_KEYS)} or base: the folder is damaged")
    check_identity(where, about, identity(options.lora, options.path))
    found = {}
    with open_tensors(folder / TENSORS) as file:
        names = set(file.keys())
        for each in adapter_slots(network, options.lora):
            for (name, shape), module in [(next(iter(each.a.shapes.items())), each.base.names[0]),
                                          *zip(each.b.shapes.items(), each.base.names, strict=True)]:
                letter = "A" if name == each.a.key else "B"
                stored = _peft_name(module, letter)
                require(stored in names and tuple(file.get_slice(stored).get_shape()) == shape,
                        f"{folder / TENSORS}: {stored} of shape {list(shape)} is not there: the folder is damaged")
                if name not in found:
                    found[name] = file.get_tensor(stored)
    return found


def starting_adapters(options: ModelConfig, network: Network,
                      seed: int) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """(name, shape) -> the whole matrix with which a run begins: of model.lora.path, or fresh ones of the seed."""
    if options.lora.path is None:
        return functools.partial(initial, seed=seed)
    tensors = read_adapters(options, network)
    return lambda name, shape: tensors[name]


def write_adapter_folder(path: str | Path, options: ModelConfig, network: Network,
                         tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write the folder from the stream of matrices (Exporter with adapters=True). An existing one is replaced when the
    new one is whole; ValueError if something else is there."""
    whole = peft_tensors(options.lora, network, tensors)
    size = sum(prod(tensor.shape) * tensor.element_size() for tensor in whole.values())
    with atomic_folder(path, size, mark=ABOUT) as folder:
        save_tensors(whole, folder / TENSORS)
        _write(folder / PEFT_CONFIG, peft_config(options, network))
        _write(folder / ABOUT, identity(options.lora, options.path))


def peft_tensors(lora: LoraConfig, network: Network,
                 tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The stream of matrices under peft's names, on the CPU. Those that modules share are there once for each."""
    found = {name: tensor.cpu().clone() for name, tensor in tensors}
    whole = {}
    for each in adapter_slots(network, lora):
        for module, b in zip(each.base.names, each.b.names, strict=True):
            whole[_peft_name(module, "A")] = found[each.a.key].clone()  # a safetensors file holds none twice
            whole[_peft_name(module, "B")] = found[b].clone()
    return whole


def why_not_peft(network: Network, lora: LoraConfig) -> str | None:
    """Why peft gives other logits for the adapter folder than the trainer; None if it gives the same, or if
    transformers has no class of its own for the family.

    Some of these folders peft loads without a warning (peft 0.21.2, transformers 5.19: utils/
    transformers_weight_conversion.py maps all gate_proj, up_proj and down_proj to the experts' tensors).
    """
    mlp = {"linear_fc1", "linear_fc2"}.intersection(lora.targets)
    beside = network.num_shared_experts > 0 or network.num_moe_layers < network.num_hidden_layers
    if not (lora.on and network.num_experts and mlp) or FAMILIES[network.model_type].auto_map:
        return None
    if beside and (lora.experts != "none" or network.model_type != "qwen2_moe"):
        return "takes the MLPs beside routed experts for experts"
    if lora.experts != "none" and mlp == {"linear_fc1"}:
        return "wants linear_fc2 of routed experts beside their linear_fc1"
    return None


def check_adapter_place(path: Path, options: ModelConfig, network: Network) -> None:
    """ValueError if the folder could not be written to `path`: something else lies there, or the disk is full."""
    elements = sum(prod(shape) for slot in matrix_slots(network, options.lora).values() for shape in slot.parts)
    check_place(path.resolve(), elements * DTYPES[options.dtype].itemsize, str(path), ABOUT)


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _peft_name(weight: str, letter: str) -> str:
    return f"{_PREFIX}{weight.removesuffix('.weight')}.lora_{letter}.weight"


def peft_config(options: ModelConfig, network: Network) -> dict[str, Any]:
    """peft looks for modules whose names end with one of target_modules: where routed experts stay without adapters,
    the names say whose projection is meant."""
    lora, deep = options.lora, network.num_experts > 0 and options.lora.experts == "none"
    modules = {".".join(name.removesuffix(".weight").split(".")[-2 if deep else -1:])
               for each in adapter_slots(network, lora) for name in each.base.names}
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": options.path,
            "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
            "inference_mode": True, "init_lora_weights": True, "use_rslora": False, "use_dora": False,
            "modules_to_save": None, "target_modules": sorted(modules)}
