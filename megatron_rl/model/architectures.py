"""config.json read as a Network, strictly: what a family's table (families/) does not know is refused. No megatron."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from megatron_rl.config.load import read_json
from megatron_rl.model.families import FAMILIES
from megatron_rl.model.families.base import OTHER_NETWORKS, Family
from megatron_rl.model.network import Network, check_network, check_types
from megatron_rl.model.rope import read_rope

HF_FILES = Path(__file__).parent / "hf_files"
_EMPTY = (None, False, 0, "", [], {})
_DERIVED = {"model_type", "rope", "rotary_dim"}


def read_config(folder: str | Path, *, key: str = "model.path") -> Network:
    """The network of a Hugging Face folder, which `key` names. ValueError names the file and the key that does not fit.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{key}={folder}: no config.json there; give a Hugging Face folder of a "
                         f"{', '.join(FAMILIES)} model")
    raw = read_json(path)
    if (Path(folder) / "hf" / "config.json").is_file() and "model_type" not in raw:
        raise ValueError(f"{key}={folder} is a run's folder; the model that it wrote is {folder}/hf")
    return parse_config(raw, str(path))


def family_of(raw: Mapping[str, Any], where: str) -> Family:
    """The table of config.json's model_type, or of its class if that is published under another family's model_type."""
    model_type = raw.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.aliases and raw.get("architectures") == [family.class_name]:
            return family
    if model_type not in FAMILIES:
        raise ValueError(f"{where}: model_type={model_type!r} is not supported; only {', '.join(FAMILIES)} are "
                         "(docs/models.md says how to add one)")
    return FAMILIES[model_type]


def parse_config(raw: Mapping[str, Any], where: str) -> Network:
    """The network of the parsed config.json `raw`; `where` is named in errors."""
    family = family_of(raw, where)
    _check_keys(family, raw, where)
    rope, scaling = read_rope(raw, where)
    values = {**raw, **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})}
    found = {"model_type": family.model_type}
    missing = sorted(family.present - raw.keys())
    for item in fields(Network):
        if item.name in _DERIVED or (item.name == "head_dim" and family.is_latent):
            continue
        keys = family.keys_of(item.name, item.default is not MISSING)
        present = [values[key] for key in keys if values.get(key) is not None]
        if item.name in family.fixed:
            found[item.name] = family.fixed[item.name]
        elif present:
            found[item.name] = present[0]
        elif item.name in family.defaults:
            found[item.name] = family.defaults[item.name]
        elif item.name in family.required or (item.default is MISSING and item.name != "head_dim"):
            missing.append(keys[0])
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    check_types(found, where)
    found["head_dim"] = _head_dim(family, found, where)
    rotary_dim = _rotary_dim(family, {**raw, **rope}, found["head_dim"], where)
    network = Network(**found, rope=scaling, rotary_dim=found["qk_rope_head_dim"] if family.is_latent else rotary_dim)
    if network.num_experts == 0 and "num_experts" not in family.fixed:
        raise ValueError(f"{where}: num_experts=0: a {network.model_type} has experts")
    check_network(network, where)
    for key, other in family.same.items():
        if key in raw and raw[key] != getattr(network, other):
            raise ValueError(f"{where}: {key}={json.dumps(raw[key])} is not supported; only {other}="
                             f"{getattr(network, other)} is")
    return network


def _head_dim(family: Family, found: Mapping[str, Any], where: str) -> int:
    if family.is_latent:
        return found["qk_nope_head_dim"] + found["qk_rope_head_dim"]
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    if "head_dim" not in found and (heads < 1 or hidden % heads):
        raise ValueError(f"{where}: num_attention_heads={heads} does not divide hidden_size={hidden}")
    return found.get("head_dim") or hidden // heads


def _check_keys(family: Family, raw: Mapping[str, Any], where: str) -> None:
    """ValueError naming the first key by which engine or transformers would build another network than the trainer."""
    for key in sorted(family.not_null & raw.keys()):
        if raw[key] is None:
            raise ValueError(f"{where}: {key}=null breaks the engine: leave the key out")
    for key, value in family.only.items():
        _require_only(where, key, raw.get(key), value)
    for key in sorted((OTHER_NETWORKS - family.only.keys() - family.ignored - family.meant) & raw.keys()):
        if raw[key] not in _EMPTY:
            raise ValueError(f"{where}: {key}={json.dumps(raw[key])} is not supported: it makes another network than "
                             f"{raw['model_type']}")
    sliding = {kind for kind in raw.get("layer_types") or () if kind != "full_attention"}
    if sliding:
        raise ValueError(f"{where}: layer_types with {', '.join(sorted(map(str, sliding)))} is not supported; only "
                         "full_attention is")


def _require_only(where: str, key: str, found: Any, accepted: Any) -> None:
    if found is not None and (found != accepted or isinstance(found, bool) != isinstance(accepted, bool)):
        raise ValueError(f"{where}: {key}={json.dumps(found)} is not supported; only {json.dumps(accepted)} is")


def _rotary_dim(family: Family, raw: Mapping[str, Any], head_dim: int, where: str) -> int:
    """Network.rotary_dim, from the key that holds it. raw: config.json with the rotation's own parameters on top."""
    factor, dim = raw.get("partial_rotary_factor"), raw.get("rotary_dim")
    if not family.partial_rotation:
        _require_only(where, "partial_rotary_factor", factor, 1.0)
        return 0
    if factor is None and dim is None:
        factor = family.defaults.get("partial_rotary_factor", 1.0)
    if factor is not None and (type(factor) not in (int, float) or not 0 < factor <= 1):
        raise ValueError(f"{where}: partial_rotary_factor={json.dumps(factor)} must be a number above 0, at most 1")
    if dim is not None and (type(dim) is not int or not 0 < dim <= head_dim):
        raise ValueError(f"{where}: rotary_dim={json.dumps(dim)} must be int in 1..head_dim={head_dim}")
    if None not in (factor, dim) and int(head_dim * factor) != dim:
        raise ValueError(f"{where}: rotary_dim={dim} and partial_rotary_factor={factor} of head_dim={head_dim} say "
                         "different things: keep the one that is meant")
    found = int(head_dim * factor) if dim is None else dim
    return 0 if found == head_dim else found
