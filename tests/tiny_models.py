"""Tiny random models as Hugging Face folders: config, configuration file, weights, tokenizer.

Used by the engine tests and the model tests. The tokenizer has one token per character.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rl.model.architectures import read_config
from megatron_rl.model.families import FAMILIES
from megatron_rl.model.fresh import bailing_config
from megatron_rl.model.slots import expected_shapes

END_OF_TEXT = "<|end|>"
CHARACTERS = ["\n"] + [chr(code) for code in range(32, 126)]
REPOSITORY = Path(__file__).resolve().parents[1]
HF_FILES = REPOSITORY / "megatron_rl" / "model" / "hf_files"

TINY_CONFIG = {
    "architectures": ["BailingMoeForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_bailing_moe.BailingMoeConfig"},
    **bailing_config(**FAMILIES["bailing_moe"].tiny),
}


def tiny_bailing_weights(config: dict, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under their checkpoint names, in the checkpoint's order and dtype.

    Normal with deviation initializer_range; norms are 1 plus such noise, so that a lost norm weight shows.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config["torch_dtype"]]
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    weights: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int, mean: float = 0.0) -> None:
        noise = torch.randn(shape, generator=generator) * config["initializer_range"]
        weights[name] = (noise + mean).to(dtype)

    def add_mlp(prefix: str, width: int) -> None:
        add(f"{prefix}.gate_proj.weight", width, hidden)
        add(f"{prefix}.up_proj.weight", width, hidden)
        add(f"{prefix}.down_proj.weight", hidden, width)

    add("model.word_embeddings.weight", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"] + config.get("num_nextn_predict_layers", 0)):
        prefix = f"model.layers.{layer}"
        add(f"{prefix}.input_layernorm.weight", hidden, mean=1.0)
        add(f"{prefix}.attention.query_key_value.weight", (heads + 2 * kv_heads) * head_dim, hidden)
        if config["use_qkv_bias"]:
            add(f"{prefix}.attention.query_key_value.bias", (heads + 2 * kv_heads) * head_dim)
        for norm in ("query_layernorm", "key_layernorm") if config.get("use_qk_norm") else ():
            add(f"{prefix}.attention.{norm}.weight", head_dim, mean=1.0)
        add(f"{prefix}.attention.dense.weight", hidden, heads * head_dim)
        add(f"{prefix}.post_attention_layernorm.weight", hidden, mean=1.0)
        if layer >= config["num_hidden_layers"]:
            add(f"{prefix}.eh_proj.weight", hidden, 2 * hidden)
            for norm in ("enorm", "hnorm", "final_layernorm"):
                add(f"{prefix}.{norm}.weight", hidden, mean=1.0)
        if layer < config["first_k_dense_replace"]:
            add_mlp(f"{prefix}.mlp", config["intermediate_size"])
            continue
        add(f"{prefix}.mlp.gate.weight", config["num_experts"], hidden)
        if config.get("moe_router_enable_expert_bias"):  # of the size that scores differ by: it changes choices
            weights[f"{prefix}.mlp.gate.expert_bias"] = torch.randn(config["num_experts"], generator=generator) / 10
        for expert in range(config["num_experts"]):
            add_mlp(f"{prefix}.mlp.experts.{expert}", config["moe_intermediate_size"])
        if config["num_shared_experts"]:
            add_mlp(f"{prefix}.mlp.shared_experts", config["moe_intermediate_size"] * config["num_shared_experts"])
    add("model.norm.weight", hidden, mean=1.0)
    if not config["tie_word_embeddings"]:
        add("lm_head.weight", config["vocab_size"], hidden)
    return weights


def write_tiny_tokenizer(path: Path, vocab_size: int) -> None:
    """One token per character: 0 ends the text, 1 is the newline, then printable ASCII, then unused names."""
    names = [END_OF_TEXT, *CHARACTERS][:vocab_size]
    names += [f"<|unused{index}|>" for index in range(len(names), vocab_size)]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
    fast.save_pretrained(path)


def write_tiny_bailing(path: str | Path, model_type: str = "bailing_moe", *, seed: int = 0, norm_head: bool = False,
                       **overrides: object) -> Path:
    """Writes a loadable folder of bailing_moe or bailing_moe_v2 and returns it; `overrides` replace config.json's keys.

    head_dim follows hidden_size / num_attention_heads unless it is given.
    """
    folder, family = Path(path), FAMILIES[model_type]
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [family.class_name], "auto_map": dict(family.auto_map),
              **bailing_config(model_type=model_type, **family.tiny), "norm_head": norm_head, **overrides}
    if "head_dim" not in overrides:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in family.files:
        shutil.copy(HF_FILES / name, folder / name)
    save_file(tiny_bailing_weights(config, seed=seed), folder / "model.safetensors", metadata={"format": "pt"})
    write_tiny_tokenizer(folder, config["vocab_size"])
    return folder


def write_tiny_known(path: str | Path, model_type: str, *, seed: int = 0, **overrides: object) -> Path:
    """A tiny random model of a model_type that transformers knows (llama, qwen2, glm4_moe, ...), as it saves it.

    Weights are normal with deviation initializer_range, norms and biases included (norms around 1).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {**FAMILIES[model_type].tiny, **overrides}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, model.config.initializer_range)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # of the size that scores differ by: it changes choices
                buffer.normal_(0.0, 0.1)
    model.save_pretrained(path)
    if keys.get("num_nextn_predict_layers"):
        _add_layer_behind(Path(path), model.config.initializer_range)
    write_tiny_tokenizer(Path(path), model.config.vocab_size)
    return Path(path)


def _add_layer_behind(folder: Path, deviation: float) -> None:
    """What transformers does not read: a random layer for multi-token prediction, and GLM-4.5's copy of the head."""
    network, file = read_config(folder), folder / "model.safetensors"
    tensors = load_file(file)
    for name, shape in expected_shapes(network, mtp=True).items():
        if name not in tensors:
            bias = name.endswith("e_score_correction_bias")
            tensors[name] = torch.randn(shape) * (0.1 if bias else deviation) + float("norm" in name)
    tensors[f"model.layers.{network.num_hidden_layers}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
