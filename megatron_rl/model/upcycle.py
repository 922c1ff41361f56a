"""A dense Llama, Qwen2 or Qwen3 checkpoint -> a BailingMoe of the same function: each FFN becomes the shared expert.

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

from megatron_rl.model.architectures import read_config
from megatron_rl.model.fresh import FRESH_FAMILIES, bailing_config
from megatron_rl.model.hf_folder import HFReader, check_checkpoint, write_hf_folder
from megatron_rl.model.network import Network

ROUTER_STD = 0.02  # the same as Llama's initializer_range: near-uniform, yet no two experts alike
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def upcycle(source_folder: str | Path, target_folder: str | Path, *, model_type: str = FRESH_FAMILIES[0],
            num_experts: int = 8, experts_per_token: int = 2, moe_intermediate_size: int | None = None,
            dtype: str = "float32", seed: int = 0, expert_noise: float = 0.1) -> Path:
    """Write the BailingMoe folder made from the dense folder; returns target_folder.

    model_type: bailing_moe, or bailing_moe_v2, which keeps norms of queries and keys, and whose router begins with
    sigmoid scores, biases of zero and one group.
    moe_intermediate_size (default: a quarter of the FFN) must divide the FFN width; the quotient is
    num_shared_experts. expert_noise: deviation of the noise on a routed expert's gate and up rows, as a share
    of that matrix's own. The source's other files are kept. ValueError names what of the source (experts, a kind of
    rope_scaling, ...) a BailingMoe of this project cannot hold.
    """
    source = Path(source_folder)
    if source.resolve() == Path(target_folder).resolve():
        raise ValueError(f"{target_folder}: source and target are the same folder")
    if model_type not in FRESH_FAMILIES:
        raise ValueError(f"--model-type={model_type} must be one of {', '.join(FRESH_FAMILIES)}")
    if expert_noise < 0:
        raise ValueError(f"expert_noise={expert_noise} must not be negative")
    dense = _read_dense(source, model_type)
    config = _moe_config(dense, source, model_type, num_experts, experts_per_token, moe_intermediate_size, dtype)
    reader = HFReader(source)
    check_checkpoint(dense, reader)
    return write_hf_folder(target_folder, config, _moe_weights(reader, dense, config, seed, expert_noise),
                           tokenizer_from=source)


def _read_dense(folder: Path, model_type: str) -> Network:
    network = read_config(folder)
    reasons = {
        "it has experts already": network.num_experts > 0,
        "a bailing_moe has no norms of queries and keys, and they cannot be folded into its weights; a bailing_moe_v2 "
        "has (--model-type bailing_moe_v2)": network.qk_norm and model_type == "bailing_moe",
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{folder}/config.json: model_type={network.model_type!r} cannot be upcycled: {reason}")
    return network


def _moe_config(dense: Network, folder: Path, model_type: str, num_experts: int, experts_per_token: int,
                width: int | None, dtype: str) -> dict[str, Any]:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(raw.get("eos_token_id"), int):
        raise ValueError(f"{folder}/config.json: eos_token_id={raw.get('eos_token_id')} is not supported; it must be "
                         "one token")
    ffn = dense.intermediate_size
    if width is None:
        if ffn % 4:
            raise ValueError(f"{folder}: intermediate_size={ffn} is no multiple of 4; give moe_intermediate_size")
        width = ffn // 4
    if width < 1 or ffn % width:
        raise ValueError(f"moe_intermediate_size={width} does not divide intermediate_size={ffn} of {folder}")
    carried = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "initializer_range")
    pad = raw.get("pad_token_id")
    second = {"use_qk_norm": dense.qk_norm, "partial_rotary_factor": 1.0, "n_group": 1, "topk_group": 1} \
        if model_type == "bailing_moe_v2" else {}
    return bailing_config(
        model_type, **second, **{key: getattr(dense, key) for key in carried}, use_qkv_bias=dense.qkv_bias,
        rope_theta=float(dense.rope_theta), rope_scaling=dense.rope.as_config(), bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw["eos_token_id"],
        pad_token_id=raw["eos_token_id"] if pad is None else pad, num_experts=num_experts,
        num_experts_per_tok=experts_per_token, moe_intermediate_size=width, num_shared_experts=ffn // width,
        torch_dtype=dtype)


def _moe_weights(reader: HFReader, dense: Network, config: dict[str, Any], seed: int,
                 expert_noise: float) -> Iterator[tuple[str, torch.Tensor]]:
    def get(name: str) -> torch.Tensor:
        return reader.get(name).float()

    generator = torch.Generator().manual_seed(seed)
    yield "model.word_embeddings.weight", get("model.embed_tokens.weight")
    for layer in range(dense.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", get(f"{prefix}.{norm}.weight")
        for kind in ("weight", "bias") if dense.qkv_bias else ("weight",):
            parts = [get(f"{prefix}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            yield f"{prefix}.attention.query_key_value.{kind}", torch.cat(parts)
        for norm, part in (("query_layernorm", "q_norm"), ("key_layernorm", "k_norm")) if dense.qk_norm else ():
            yield f"{prefix}.attention.{norm}.weight", get(f"{prefix}.self_attn.{part}.weight")
        yield f"{prefix}.attention.dense.weight", get(f"{prefix}.self_attn.o_proj.weight")
        ffn = {part: get(f"{prefix}.mlp.{part}.weight") for part in _PROJECTIONS}
        for part, tensor in ffn.items():
            yield f"{prefix}.mlp.shared_experts.{part}.weight", tensor
        gate = torch.randn(config["num_experts"], config["hidden_size"], generator=generator) * ROUTER_STD
        yield f"{prefix}.mlp.gate.weight", gate
        if config.get("moe_router_enable_expert_bias"):
            yield f"{prefix}.mlp.gate.expert_bias", torch.zeros(config["num_experts"])
        for expert, rows in enumerate(_expert_rows(config, generator)):
            for part in ("gate_proj", "up_proj"):
                noise = torch.randn(len(rows), config["hidden_size"], generator=generator)
                weight = ffn[part][rows] + noise * (expert_noise * ffn[part].std())
                yield f"{prefix}.mlp.experts.{expert}.{part}.weight", weight
            down = torch.zeros(config["hidden_size"], len(rows))
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", down
    yield "model.norm.weight", get("model.norm.weight")
    yield "lm_head.weight", get("model.embed_tokens.weight" if dense.tie_word_embeddings else "lm_head.weight")


def _expert_rows(config: dict[str, Any], generator: torch.Generator) -> Iterator[torch.Tensor]:
    """int64 [moe_intermediate_size] for each routed expert: its neurons, from shuffles of the FFN's, cut in a row."""
    rows = torch.empty(0, dtype=torch.int64)
    for _ in range(config["num_experts"]):
        if len(rows) == 0:
            rows = torch.randperm(config["intermediate_size"], generator=generator)
        yield rows[:config["moe_intermediate_size"]]
        rows = rows[config["moe_intermediate_size"]:]
