"""model.backend and model.kernels resolved for a machine: what computes each part of a layer there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_rl.config.kernels import KernelConfig
from megatron_rl.config.rules import require
from megatron_rl.config.schema import ModelConfig, ParallelConfig
from megatron_rl.model.families import FAMILIES
from megatron_rl.model.network import Network

FLASH_HEAD_DIM = 256
"""The largest of torch's flash attention (flash_attn/flash_api.cpp), which also wants multiples of 8."""
GROUPED_BYTES = 16
"""A row of a matrix of torch._grouped_mm is a multiple of this."""

WITH_DEVICE_COUNTS = ("grouped_mm", "triton")
"""Implementations of the experts that are one product, and take their rows' counts from the device."""


@dataclass(frozen=True)
class Backend:
    """name: torch, megatron or transformer_engine. attention_at_once: one call for the micro-batch, else one per run
    of it (model/attention.py). kernels: without `auto`."""

    name: str
    attention_at_once: bool
    kernels: KernelConfig

    def __str__(self) -> str:
        """For people: what was chosen of each part."""
        attention = "of a micro-batch at once" if self.attention_at_once else "sequence by sequence"
        kernels = self.kernels
        return (f"{self.name}: attention {attention}, experts {kernels.experts}, router {kernels.router}, "
                f"log-probabilities {kernels.logprob}, pointwise {kernels.pointwise}")


def on_gpu() -> bool:
    return torch.cuda.is_available()


def resolve(options: ModelConfig, *, gpu: bool) -> Backend:
    """`auto` is torch for bfloat16 on a GPU and megatron elsewhere. On a CPU torch has no call for a whole micro-batch.
    """
    name = options.backend
    if name == "auto":
        name = "torch" if gpu and options.dtype == "bfloat16" else "megatron"
    kernels = options.kernels
    if kernels.experts == "auto":
        kernels = replace(kernels, experts="grouped_mm" if name == "torch" else name)
    if kernels.router == "auto":
        kernels = replace(kernels, router="megatron")
    on_gpu_by_torch = name == "torch" and gpu
    if kernels.logprob == "auto":
        kernels = replace(kernels, logprob="fused" if on_gpu_by_torch and options.fp32_lm_head else "chunked")
    if kernels.pointwise == "auto":
        kernels = replace(kernels, pointwise="triton" if on_gpu_by_torch else "torch")
    return Backend(name, name != "megatron" and gpu, kernels)


def check_backend(options: ModelConfig, network: Network, parallel: ParallelConfig, *, gpu: bool) -> None:
    """ValueError, naming the key, if the parts that were chosen cannot take this network in this dtype."""
    backend = resolve(options, gpu=gpu)
    with_te = backend.name == "transformer_engine"
    require(gpu or not with_te, "model.backend=transformer_engine: its kernels run on a GPU only, and there is none; "
            "leave it at auto")
    require(with_te or options.kernels.experts != "transformer_engine",
            "model.kernels.experts=transformer_engine needs model.backend=transformer_engine")
    require(not with_te or options.kernels.pointwise != "triton",
            "model.kernels.pointwise=triton with model.backend=transformer_engine, whose layers have kernels of their "
            "own for this; leave it at auto")
    if gpu and backend.name != "megatron":
        require(options.dtype == "bfloat16",
                f"model.backend={backend.name} with model.dtype={options.dtype}: its attention takes bfloat16 on a "
                "GPU; set model.dtype=bfloat16, or model.backend=megatron")
        require(network.head_dim % 8 == 0 and network.head_dim <= FLASH_HEAD_DIM,
                f"model.path: head_dim={network.head_dim}, and the attention of model.backend={options.backend} takes "
                f"multiples of 8 up to {FLASH_HEAD_DIM} on a GPU; set model.backend=megatron")
    require(not (with_te and network.kv_lora_rank), "model.backend=transformer_engine: its layers have no latent "
            f"attention, which this {network.model_type} has; set model.backend=torch")
    again = options.recompute_modules if options.recompute == "selective" else ()
    require(not (network.kv_lora_rank and "core_attn" in again), f"model.recompute_modules={','.join(again)}: latent "
            f"attention, which this {network.model_type} has, is not recomputed by itself; leave core_attn out, or set "
            "model.recompute=full")
    plain = network.score_function == "softmax" and network.routed_scaling_factor == 1 and not network.limits_groups
    require(backend.kernels.router == "megatron" or plain,
            f"model.kernels.router={options.kernels.router}: its kernel has softmax scores without a factor or groups, "
            f"and this {network.model_type} has score_function={network.score_function}, routed_scaling_factor="
            f"{network.routed_scaling_factor} and n_group={network.n_group}; set model.kernels.router=megatron")
    require(options.expert_bias_rate == 0 or network.expert_bias,
            f"model.expert_bias_rate={options.expert_bias_rate}: this {network.model_type} network has no expert bias; "
            "set it to 0")
    if options.mtp:
        _check_mtp(options, network, parallel, backend)
    if network.num_experts and backend.kernels.experts == "grouped_mm":
        key = "model.kernels.experts=grouped_mm" if options.kernels.experts == "grouped_mm" else \
            f"model.backend={options.backend}"
        width = network.moe_intermediate_size // parallel.etp
        unit = GROUPED_BYTES // (2 if options.dtype == "bfloat16" else 4)
        require(network.hidden_size % unit == 0 and width % unit == 0,
                f"{key}: its product wants rows of {GROUPED_BYTES} bytes, multiples of {unit} in {options.dtype}, not "
                f"hidden_size={network.hidden_size} and moe_intermediate_size/parallel.etp={width}; set "
                "model.kernels.experts=megatron")
        require(not gpu or options.dtype == "bfloat16",
                f"{key} with model.dtype={options.dtype}: on a GPU it takes bfloat16; set model.dtype=bfloat16, or "
                "model.kernels.experts=megatron")


def _check_mtp(options: ModelConfig, network: Network, parallel: ParallelConfig, backend: Backend) -> None:
    layers = network.num_nextn_predict_layers
    require(layers == 1, f"model.mtp=true: this {network.model_type} network has num_nextn_predict_layers={layers}, "
            "and one layer behind the last can be trained; set model.mtp=false")
    require("mtp.enorm.weight" in FAMILIES[network.model_type].names, f"model.mtp=true: the layer behind the last of a "
            f"{network.model_type} is carried through, not trained; set model.mtp=false")
    require(parallel.pp == 1, f"model.mtp=true with parallel.pp={parallel.pp}: the layer behind the last needs the "
            "embedding and the last states on one rank; set parallel.pp=1 or model.mtp=false")
    require(not options.lora.on, "model.mtp=true with model.lora, which freezes all weights of model.path: set one of "
            "them")
    require(backend.name != "transformer_engine", "model.mtp=true with model.backend=transformer_engine, for which the "
            "layer behind the last is not built; set model.backend=torch")
