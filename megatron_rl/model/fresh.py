"""A fresh BailingMoe or BailingMoeV2: config.json and random initial weights, to be written by write_hf_folder.

No megatron here: the launcher makes models before any rank starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Literal

import torch

from megatron_rl.model.architectures import parse_config
from megatron_rl.model.hf_folder import storage_dtype
from megatron_rl.model.network import Network
from megatron_rl.model.slots import network_slots

# The quick start's model (630,624 parameters); bailing_config replaces what it is given.
_QUICKSTART_CONFIG: dict[str, Any] = {
    "model_type": "bailing_moe",
    "vocab_size": 96,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": None,
    "hidden_act": "silu",
    "use_qkv_bias": False,
    "use_bias": False,
    "rms_norm_eps": 1e-6,
    "norm_head": False,
    "tie_word_embeddings": False,
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
    "output_dropout": 0.0,
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "rope_theta": 600000.0,
    "rope_scaling": None,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "num_experts": 8,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 0,
    "torch_dtype": "float32",
}
_V2_CONFIG: dict[str, Any] = {
    **_QUICKSTART_CONFIG,
    "model_type": "bailing_moe_v2",
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
}
_CONFIGS = {config["model_type"]: config for config in (_QUICKSTART_CONFIG, _V2_CONFIG)}
FRESH_FAMILIES = tuple(_CONFIGS)


def bailing_config(model_type: str = "bailing_moe", **keys: Any) -> dict[str, Any]:
    """A complete config.json of a BailingMoe (bailing_moe_v2: of its successor) that SGLang accepts.

    Where `keys` has none, the sizes are the quick start's. head_dim is hidden_size / num_attention_heads unless
    given. ValueError names an unknown or unfitting key.
    """
    if model_type not in _CONFIGS:
        raise ValueError(f"config.json: model_type={model_type!r} must be one of {', '.join(_CONFIGS)}")
    base = _CONFIGS[model_type]
    for key in keys:
        if key not in base:
            close = get_close_matches(key, base, 1)
            raise ValueError(f"config.json: unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    config = {**base, **keys}
    model = parse_config(config, "config.json")
    storage_dtype(config, "config.json")
    return {**config, "head_dim": model.head_dim}


def random_weights(config: dict[str, Any], seed: int, *,
                   scheme: Literal["scaled", "normal"] = "scaled") -> Iterator[tuple[str, torch.Tensor]]:
    """Random initial weights (name, tensor in the config's dtype), the same for the same seed. Norms are 1, biases 0.

    normal: every matrix normal with deviation initializer_range. scaled: for small models trained from scratch;
    embedding 0.5, head 0.02, projections 0.7 / sqrt(inputs), and those that write to the residual stream
    1 / sqrt(inputs * 2 * layers), a routed expert's inputs counted num_experts_per_tok times.
    """
    if scheme not in ("scaled", "normal"):
        raise ValueError(f"scheme={scheme!r} must be 'scaled' or 'normal'")
    model, dtype = parse_config(config, "config.json"), storage_dtype(config, "config.json")
    generator = torch.Generator().manual_seed(seed)
    for parameter, slot in network_slots(model).items():
        for name, shape in slot.shapes.items():
            if len(shape) == 1:
                yield name, torch.full(shape, 0.0 if parameter.endswith("bias") else 1.0,
                                       dtype=slot.frozen_dtype or dtype)
                continue
            deviation = model.initializer_range if scheme == "normal" else _scaled_deviation(model, parameter, shape)
            yield name, (torch.randn(shape, generator=generator) * deviation).to(dtype)


def _scaled_deviation(model: Network, parameter: str, shape: tuple[int, ...]) -> float:
    if parameter in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return 0.02 if parameter == "output_layer.weight" else 0.5
    inputs = shape[1]
    if parameter.endswith(("linear_proj.weight", "linear_fc2.weight")):
        summed = model.num_experts_per_tok if ".local_experts." in parameter else 1
        return 1.0 / math.sqrt(inputs * summed * 2 * model.num_hidden_layers)
    return 0.7 / math.sqrt(inputs)
