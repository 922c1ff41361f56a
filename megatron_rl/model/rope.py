"""Rotary embedding as config.json gives it: its base, its scaling by name, and the frequencies that follow.

transformers (modeling_rope_utils.ROPE_INIT_FUNCTIONS, 5.19.0) and SGLang (layers/rotary_embedding/factory.py, 0.5.23)
both read the scaling. A key that only one of them reads, or that they take otherwise, is refused. No megatron here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

_BLOCKS = ("rope_parameters", "rope_scaling")  # transformers 5 writes the first, older versions the second
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_RENAMED = {"original": "original_max_position_embeddings"}
ORIGINAL = _RENAMED["original"]
_NEEDED = {
    "default": (), "linear": ("factor",), "yarn": ("factor", ORIGINAL),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
}
_OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}
_ONE_SIDED = {"attention_factor": "transformers", "attn_factor": "SGLang", "extrapolation_factor": "SGLang",
              "apply_yarn_scaling": "SGLang", "apply_scale": "SGLang"}


@dataclass(frozen=True)
class RopeScaling:
    """How the rotation is stretched beyond the lengths of pretraining.

    kind: default (not at all), linear, llama3 or yarn. Every frequency is divided by `factor` (linear), or the low
    ones are and the high ones stay (llama3 and yarn).

    - original: the length of pretraining, in tokens (original_max_position_embeddings).
    - low_freq_factor, high_freq_factor: llama3 blends frequencies that turn between so many times in `original`.
    - beta_fast, beta_slow: yarn blends between so many turns; truncate: the bounds are whole pairs of dimensions.
    - mscale, mscale_all_dim: of yarn's attention factor (`attention_factor`, `softmax_factor`). None: not given.
    """

    kind: str = "default"
    factor: float = 1.0
    original: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by (arXiv 2309.00071, Section 3.4): 1 but for yarn."""
        if self.kind != "yarn":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    @property
    def softmax_factor(self) -> float:
        """What latent attention multiplies its softmax scale by (transformers' yarn_apply_mscale): 1 but for yarn."""
        return _mscale(self.factor, self.mscale_all_dim or 0.0) ** 2 if self.kind == "yarn" else 1.0

    def as_config(self) -> dict[str, Any] | None:
        """config.json's rope_scaling that says the same."""
        if self.kind == "default":
            return None
        keys = (*_NEEDED[self.kind], *_OPTIONAL.get(self.kind, ()))
        found = {_RENAMED.get(item.name, item.name): getattr(self, item.name) for item in fields(self)}
        return {"type": self.kind} | {key: found[key] for key in keys if found[key] is not None}


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(scaling: RopeScaling, theta: float, dim: int, device: torch.device | None = None
                        ) -> torch.Tensor:
    """fp32 [dim/2]: the angle of pair i at position p is p times number i."""
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    if scaling.kind == "default":
        return plain
    slow = plain / scaling.factor
    if scaling.kind == "linear":
        return slow
    kept = _kept_by_llama3(scaling, plain) if scaling.kind == "llama3" else _kept_by_yarn(scaling, theta, plain)
    return slow * (1 - kept) + plain * kept


def _kept_by_llama3(scaling: RopeScaling, plain: torch.Tensor) -> torch.Tensor:
    """Share of each frequency that stays: 1 if it turns high_freq_factor times in `original`, 0 at low_freq_factor."""
    turns = scaling.original * plain / (2 * math.pi)
    return ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)


def _kept_by_yarn(scaling: RopeScaling, theta: float, plain: torch.Tensor) -> torch.Tensor:
    """The same for YaRN (arXiv 2309.00071, Eq. 17 and 18): a ramp over pairs between beta_fast and beta_slow turns."""
    dim = 2 * len(plain)

    def pair(turns: float) -> float:
        return dim * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    pairs = torch.arange(len(plain), dtype=plain.dtype, device=plain.device)
    return 1 - ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)


def read_rope(raw: Mapping[str, Any], where: str) -> tuple[dict[str, Any], RopeScaling]:
    """(everything that config.json says of the rotation, its scaling). ValueError, naming the key, if transformers and
    SGLang would not both make the same of it."""
    given = [raw[name] for name in _BLOCKS if raw.get(name)]
    if len(given) == 2 and given[0] != given[1]:
        raise ValueError(f"{where}: rope_parameters={given[0]} and rope_scaling={given[1]} say different things, and "
                         "transformers takes one of them: keep the one that is meant")
    found = given[0] if given else {}
    if not isinstance(found, dict):
        raise ValueError(f"{where}: rope_parameters={json.dumps(found)} must be a mapping")
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "dynamic":
        raise ValueError(
            f"{where}: rope_scaling={found} is not supported: transformers recomputes the base as a sequence "
            "grows, SGLang takes one base for all lengths, so engine and trainer would disagree. Up to "
            "max_position_embeddings the network is the one with rope_scaling null")
    if kind not in _NEEDED:
        raise ValueError(f"{where}: rope_scaling={found} is not supported; only null, linear, llama3 and yarn are")
    _check_keys(kind, found, where)
    scaling = _scaling(kind, found, where)
    outer = raw.get(ORIGINAL)
    if kind in ("llama3", "yarn") and outer not in (None, scaling.original):
        raise ValueError(f"{where}: {ORIGINAL}={json.dumps(outer)} is not supported beside rope_scaling.{ORIGINAL}="
                         f"{scaling.original}: transformers takes the first, SGLang the second")
    return {"rope_type": kind} | found, scaling


def _check_keys(kind: str, found: Mapping[str, Any], where: str) -> None:
    known = {*_COMMON, *_NEEDED[kind], *_OPTIONAL.get(kind, ())}
    for key in sorted(found.keys() - known):
        if found[key] is None or (key == ORIGINAL and type(found[key]) is int):
            continue  # transformers writes it whatever the kind is
        if key in _ONE_SIDED and kind == "yarn":
            raise ValueError(f"{where}: rope_scaling.{key}={json.dumps(found[key])} is not supported: only "
                             f"{_ONE_SIDED[key]} reads it, so engine and checkpoint would disagree")
        raise ValueError(f"{where}: {key}={json.dumps(found[key])} in the rotation's parameters is not supported; "
                         f"only {', '.join(sorted(known))} are with rope_type {kind}")


def _scaling(kind: str, found: Mapping[str, Any], where: str) -> RopeScaling:
    def number(key: str, least: float) -> float:
        value = found.get(key)
        if type(value) not in (int, float) or not least <= value < math.inf:
            raise ValueError(f"{where}: rope_scaling.{key}={json.dumps(value)} must be a number of at least {least}")
        return float(value)

    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        factor = found.get("factor")
        if type(factor) is not float or factor < 1.0:
            raise ValueError(f"{where}: rope_scaling.factor={factor!r} must be a float of at least 1.0 (the engine "
                             "takes no integer)")
        return RopeScaling(kind, factor)
    original = found.get(ORIGINAL)
    if type(original) is not int or original < 1:
        raise ValueError(f"{where}: rope_scaling.{ORIGINAL}={json.dumps(original)} must be int above 0: the length of "
                         "pretraining")
    if kind == "llama3":
        scaling = RopeScaling(kind, number("factor", 1.0), original, number("low_freq_factor", 0.0),
                              number("high_freq_factor", 0.0))
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise ValueError(f"{where}: rope_scaling.low_freq_factor={scaling.low_freq_factor} must be below "
                             f"high_freq_factor={scaling.high_freq_factor}")
        return scaling
    truncate = found.get("truncate", True)
    if type(truncate) is not bool:
        raise ValueError(f"{where}: rope_scaling.truncate={json.dumps(truncate)} must be bool")
    given = {key: number(key, 0.0) for key in _OPTIONAL["yarn"] if key in found and key != "truncate"}
    scaling = RopeScaling(kind, number("factor", 1.0), original, truncate=truncate, **given)
    if not scaling.beta_fast > scaling.beta_slow > 0:
        raise ValueError(f"{where}: rope_scaling.beta_fast={scaling.beta_fast} must be above beta_slow="
                         f"{scaling.beta_slow}, and this above 0")
    if None not in (scaling.mscale, scaling.mscale_all_dim) and not (scaling.mscale and scaling.mscale_all_dim):
        raise ValueError(f"{where}: rope_scaling.mscale={scaling.mscale} with mscale_all_dim={scaling.mscale_all_dim} "
                         "is not supported: transformers ignores both if one is 0, SGLang does not; leave both out, or "
                         "give both above 0")
    return scaling
