"""An upcycled Llama, Qwen2 or Qwen3 is the same function at step 0, its experts ready to move; the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_rl.model.architectures import read_config
from megatron_rl.model.slots import expected_shapes
from megatron_rl.model.upcycle import upcycle
from tests.reference_bailing import bailing_forward, bailing_logits
from tests.tiny_models import write_tiny_known, write_tiny_tokenizer

TARGETS = ("bailing_moe", "bailing_moe_v2")
TOKENS = [5, 90, 17, 17, 3, 42, 60, 1, 0, 33, 71, 8]


def write_tiny_llama(folder: Path, *, tied: bool = True, seed: int = 0, **overrides) -> LlamaForCausalLM:
    """Two layers, 4 query and 2 key-value heads, FFN 32, rotary base and epsilon unlike any default."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3, "rope_theta": 500.0, "tie_word_embeddings": tied, "initializer_range": 0.3,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "torch_dtype": "float32", **overrides})
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    write_tiny_tokenizer(folder, 96)
    return model


def write_tiny_qwen(folder: Path, kind: str, *, tied: bool) -> AutoModelForCausalLM:
    """As write_tiny_known makes it: qwen2 has biases of query, key and value that matter, qwen3 norms."""
    write_tiny_known(folder, kind, tie_word_embeddings=tied, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)  # a tied head is not in the file
    return model


def edit_config(folder: Path, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def load(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "target"), [
    *((kind, target) for kind in ("llama", "llama-linear_rope", "llama-yarn", "qwen2") for target in TARGETS),
    ("qwen3", "bailing_moe_v2")])
def test_logits_equal_the_dense_model(tmp_path, kind, target, tied):
    if kind.startswith("qwen"):
        dense = write_tiny_qwen(tmp_path / "dense", kind, tied=tied)
    else:
        rope = {"llama": {"rope_type": "default"}, "llama-linear_rope": {"rope_type": "linear", "factor": 4.0},
                "llama-yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}[kind]
        dense = write_tiny_llama(tmp_path / "dense", tied=tied, rope_parameters={**rope, "rope_theta": 500.0})
    config, weights = load(upcycle(tmp_path / "dense", tmp_path / "moe", model_type=target))
    assert (config["model_type"], config["use_qkv_bias"]) == (target, kind == "qwen2")
    with torch.no_grad():
        expected = dense(torch.tensor([TOKENS])).logits[0]
        found = bailing_logits(weights, config, TOKENS)
    assert expected.std() > 0.3  # the comparison says something
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_old_style_rope_theta_is_carried(tmp_path):
    write_tiny_llama(tmp_path / "dense")
    edit_config(tmp_path / "dense", rope_parameters=None, rope_theta=500.0)
    assert read_config(upcycle(tmp_path / "dense", tmp_path / "moe")).rope_theta == 500.0


@pytest.mark.parametrize("target", TARGETS)
def test_tensors_are_those_of_the_config(tmp_path, target):
    write_tiny_llama(tmp_path / "dense")
    folder = upcycle(tmp_path / "dense", tmp_path / "moe", model_type=target, num_experts=6, experts_per_token=3,
                     moe_intermediate_size=16)
    config, weights = read_config(folder), load_file(folder / "model.safetensors")
    assert (config.num_experts, config.num_experts_per_tok, config.num_shared_experts) == (6, 3, 2)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected_shapes(config)


@pytest.mark.parametrize("target", TARGETS)
def test_bfloat16_target_is_the_cast_float32_target(tmp_path, target):
    """The biases of experts stay float32."""
    write_tiny_llama(tmp_path / "dense")
    _, full = load(upcycle(tmp_path / "dense", tmp_path / "full", model_type=target))
    config, half = load(upcycle(tmp_path / "dense", tmp_path / "half", model_type=target, dtype="bfloat16"))
    assert config["torch_dtype"] == "bfloat16"
    for name in full:
        assert torch.equal(half[name], full[name] if name.endswith("expert_bias") else full[name].bfloat16())


@pytest.mark.parametrize("target", TARGETS)
def test_every_routed_expert_can_learn_and_no_two_are_alike(tmp_path, target):
    """Gradients reach the zero down_proj; num_shared_experts=1, where only the noise tells experts apart."""
    write_tiny_llama(tmp_path / "dense")
    folder = upcycle(tmp_path / "dense", tmp_path / "moe", model_type=target, num_experts=4, moe_intermediate_size=32)
    config, weights = load(folder)
    weights = {name: tensor.requires_grad_() for name, tensor in weights.items()}
    tokens = list(range(48))
    logits, routes = bailing_forward(weights, config, tokens)
    logits.log_softmax(-1).square().sum().backward()
    prefix = "model.layers.0.mlp.experts"
    assert set(routes[0].flatten().tolist()) == {0, 1, 2, 3}
    for expert in range(4):
        assert weights[f"{prefix}.{expert}.down_proj.weight"].grad.abs().max() > 1e-3
        assert not weights[f"{prefix}.{expert}.down_proj.weight"].any()
    sums = [weights[f"{prefix}.{expert}.gate_proj.weight"].sum(0) for expert in range(4)]  # blind to row order
    assert all((sums[i] - sums[j]).abs().max() > 0.05 for i in range(4) for j in range(i))


def test_experts_of_one_round_share_no_neuron(tmp_path):
    """FFN 32 in experts of 8: four experts are a partition of the dense neurons when there is no noise."""
    write_tiny_llama(tmp_path / "dense")
    _, weights = load(upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=4, expert_noise=0.0))
    rows = torch.cat([weights[f"model.layers.1.mlp.experts.{e}.gate_proj.weight"] for e in range(4)])
    dense = weights["model.layers.1.mlp.shared_experts.gate_proj.weight"]
    assert torch.equal(rows[rows[:, 0].argsort()], dense[dense[:, 0].argsort()])


def test_seed_decides_every_random_number(tmp_path):
    write_tiny_llama(tmp_path / "dense")
    first, again, other = (load(upcycle(tmp_path / "dense", tmp_path / name, seed=seed))[1]
                           for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for part in ("gate", "experts.0.up_proj"):
        assert not torch.equal(first[f"model.layers.0.mlp.{part}.weight"], other[f"model.layers.0.mlp.{part}.weight"])


def test_tokenizer_files_are_copied(tmp_path):
    write_tiny_llama(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "moe" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()


@pytest.mark.parametrize(("keys", "message"), [
    ({"attention_bias": True}, "attention_bias=true"),
    ({"mlp_bias": True}, "mlp_bias=true"),
    ({"hidden_act": "gelu"}, 'hidden_act="gelu"'),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling=.*dynamic"),
    ({"eos_token_id": [0, 1]}, r"eos_token_id=\[0, 1\]"),
    ({"model_type": "qwen3"}, "model_type='qwen3' cannot be upcycled: a bailing_moe has no norms of queries and keys"),
    ({"model_type": "bailing_moe", "num_experts": 2, "num_experts_per_tok": 2, "num_shared_experts": 1,
      "moe_intermediate_size": 8, "norm_topk_prob": True}, "cannot be upcycled: it has experts already"),
    ({"vocab_size": None}, "missing vocab_size"),
])
def test_unsupported_source_is_named(tmp_path, keys, message):
    write_tiny_llama(tmp_path / "dense")
    edit_config(tmp_path / "dense", **keys)
    with pytest.raises(ValueError, match=message):
        upcycle(tmp_path / "dense", tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("extra", ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.k_norm.weight"])
def test_unsupported_tensor_is_named(tmp_path, extra):
    write_tiny_llama(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    save_file({**load_file(file), extra: torch.zeros(32)}, file)
    with pytest.raises(ValueError, match=extra):
        upcycle(tmp_path / "dense", tmp_path / "moe")


def test_what_does_not_fit_is_named(tmp_path):
    write_tiny_llama(tmp_path / "dense")
    with pytest.raises(ValueError, match="moe_intermediate_size=12 does not divide intermediate_size=32"):
        upcycle(tmp_path / "dense", tmp_path / "moe", moe_intermediate_size=12)
    with pytest.raises(ValueError, match="--model-type=bailing_moe_2 must be one of bailing_moe, bailing_moe_v2"):
        upcycle(tmp_path / "dense", tmp_path / "moe", model_type="bailing_moe_2")
    with pytest.raises(ValueError, match="same folder"):
        upcycle(tmp_path / "dense", tmp_path / "dense")
