"""A dense Llama checkpoint -> a BailingMoe of the same function: each FFN becomes the shared expert.

The routed experts start as neurons of that FFN (gate and up rows, with noise) under a zero down_proj, so they
add nothing at step 0: the logits are the dense model's, and training then moves the experts (their down_proj
first, the router once they differ).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_rl.model.hf_folder import bailing_config, write_hf_folder

ROUTER_STD = 0.02  # the same as Llama's initializer_range: near-uniform, yet no two experts alike
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def upcycle_llama(source_folder: str | Path, target_folder: str | Path, *, num_experts: int = 8,
                  experts_per_token: int = 2, moe_intermediate_size: int | None = None, dtype: str = "float32",
                  seed: int = 0, expert_noise: float = 0.1) -> Path:
    """Write the BailingMoe folder made from the dense Llama folder; returns target_folder.

    moe_intermediate_size (default: a quarter of the FFN) must divide the FFN width; the quotient is
    num_shared_experts. expert_noise: deviation of the noise on a routed expert's gate and up rows, as a share
    of that matrix's own. The tokenizer's files are copied. ValueError names what of the source (bias,
    rope_scaling, query/key norms, ...) a BailingMoe of this project cannot hold.
    """
    source = Path(source_folder)
    if source.resolve() == Path(target_folder).resolve():
        raise ValueError(f"{target_folder}: source and target are the same folder")
    dense = _read_llama_config(source)
    config = _moe_config(dense, num_experts, experts_per_token, moe_intermediate_size, dtype, str(source))
    if expert_noise < 0:
        raise ValueError(f"expert_noise={expert_noise} must not be negative")
    tensors = _open_tensors(source, config["num_hidden_layers"], dense["tie_word_embeddings"])
    weights = _moe_weights(tensors, config, dense["tie_word_embeddings"], seed, expert_noise)
    return write_hf_folder(target_folder, config, weights, tokenizer_from=source)


def _read_llama_config(folder: Path) -> dict[str, Any]:
    """The source's config.json with every key that is used set. ValueError for what is not supported."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json there; give a Hugging Face folder of a dense Llama model")
    raw = json.loads(path.read_text(encoding="utf-8"))
    if raw.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type={raw.get('model_type')!r}; only 'llama' can be upcycled")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings", "rms_norm_eps", "eos_token_id")
    missing = [key for key in required if raw.get(key) is None]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    # transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling.
    rope = {"rope_theta": 10000.0, **raw, **(raw.get("rope_parameters") or {})}
    unsupported = {
        "attention_bias": bool(raw.get("attention_bias")),
        "mlp_bias": bool(raw.get("mlp_bias")),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "rope_scaling": _rope_type(raw.get("rope_scaling")) != "default",
        "rope_parameters": _rope_type(raw.get("rope_parameters")) != "default",
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "eos_token_id": not isinstance(raw["eos_token_id"], int),
    }
    for key, holds in unsupported.items():
        if holds:
            raise ValueError(f"{path}: {key}={raw.get(key, rope.get(key))} is not supported")
    heads = raw["num_attention_heads"]
    return {
        **raw,
        "rope_theta": float(rope["rope_theta"]),
        "num_key_value_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
    }


def _rope_type(parameters: dict[str, Any] | None) -> str:
    """The kind of rotary embedding that one of config.json's rope dictionaries asks for."""
    return "default" if parameters is None else parameters.get("rope_type", parameters.get("type", "default"))


def _moe_config(dense: dict[str, Any], num_experts: int, experts_per_token: int, width: int | None, dtype: str,
                where: str) -> dict[str, Any]:
    ffn = dense["intermediate_size"]
    if width is None:
        if ffn % 4:
            raise ValueError(f"{where}: intermediate_size={ffn} is no multiple of 4; give moe_intermediate_size")
        width = ffn // 4
    if width < 1 or ffn % width:
        raise ValueError(f"moe_intermediate_size={width} does not divide intermediate_size={ffn} of {where}")
    carried = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings",
               "eos_token_id")
    pad = dense.get("pad_token_id")
    return bailing_config(
        **{key: dense[key] for key in carried}, bos_token_id=dense.get("bos_token_id"),
        pad_token_id=dense["eos_token_id"] if pad is None else pad,
        initializer_range=dense.get("initializer_range", ROUTER_STD), num_experts=num_experts,
        num_experts_per_tok=experts_per_token, moe_intermediate_size=width, num_shared_experts=ffn // width,
        torch_dtype=dtype)


def _open_tensors(folder: Path, layers: int, tied: bool) -> dict[str, Any]:
    """Tensor name -> open safetensors file of a dense Llama; ValueError when the names are not exactly a Llama's."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors file there")
    where = {name: handle for handle in (safe_open(str(file), framework="pt") for file in files)
             for name in handle.keys()}
    expected = {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    parts = ("input_layernorm", "post_attention_layernorm", *(f"self_attn.{p}_proj" for p in "qkvo"),
             *(f"mlp.{p}" for p in _PROJECTIONS))
    expected |= {f"model.layers.{layer}.{part}.weight" for layer in range(layers) for part in parts}
    ignored = {name for name in where if name.endswith("rotary_emb.inv_freq")} | {"lm_head.weight"}
    missing, extra = sorted(expected - set(where)), sorted(set(where) - expected - ignored)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors missing, first {missing[0]}")
    if extra:
        raise ValueError(f"{folder}: not a plain Llama; {len(extra)} tensors are not supported (biases, query and "
                         f"key norms, ...), first {extra[0]}")
    return where


def _moe_weights(where: dict[str, Any], config: dict[str, Any], tied: bool, seed: int,
                 expert_noise: float) -> Iterator[tuple[str, torch.Tensor]]:
    def get(name: str) -> torch.Tensor:
        return where[f"{name}.weight"].get_tensor(f"{name}.weight").float()

    generator = torch.Generator().manual_seed(seed)
    yield "model.word_embeddings.weight", get("model.embed_tokens")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", get(f"{prefix}.{norm}")
        qkv = torch.cat([get(f"{prefix}.self_attn.{part}_proj") for part in "qkv"])
        yield f"{prefix}.attention.query_key_value.weight", qkv
        yield f"{prefix}.attention.dense.weight", get(f"{prefix}.self_attn.o_proj")
        ffn = {part: get(f"{prefix}.mlp.{part}") for part in _PROJECTIONS}
        for part, tensor in ffn.items():
            yield f"{prefix}.mlp.shared_experts.{part}.weight", tensor
        gate = torch.randn(config["num_experts"], config["hidden_size"], generator=generator) * ROUTER_STD
        yield f"{prefix}.mlp.gate.weight", gate
        for expert, rows in enumerate(_expert_rows(config, generator)):
            for part in ("gate_proj", "up_proj"):
                noise = torch.randn(len(rows), config["hidden_size"], generator=generator)
                weight = ffn[part][rows] + noise * (expert_noise * ffn[part].std())
                yield f"{prefix}.mlp.experts.{expert}.{part}.weight", weight
            down = torch.zeros(config["hidden_size"], len(rows))
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", down
    yield "model.norm.weight", get("model.norm")
    yield "lm_head.weight", get("model.embed_tokens" if tied else "lm_head")


def _expert_rows(config: dict[str, Any], generator: torch.Generator) -> Iterator[torch.Tensor]:
    """int64 [moe_intermediate_size] for each routed expert: its neurons, from shuffles of the FFN's, cut in a row."""
    rows = torch.empty(0, dtype=torch.int64)
    for _ in range(config["num_experts"]):
        if len(rows) == 0:
            rows = torch.randperm(config["intermediate_size"], generator=generator)
        yield rows[:config["moe_intermediate_size"]]
        rows = rows[config["moe_intermediate_size"]:]
