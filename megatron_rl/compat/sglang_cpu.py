"""SGLang's own server on a machine without a GPU (compat/sglang_key.py starts it).

Written for SGLang 0.5.23, which runs unmodified; what is adapted:
 - `sgl_kernel` has no CPU wheel: a stand-in takes its place, with the one kernel that is called (the hash
   behind per-request sampling seeds) written in torch. Delete when the registry carries a wheel.
 - `--enable-return-routed-experts` pins host memory with cudaHostRegister: a no-op here. Delete when
   sglang.srt.mem_cache.pool_host.common._cuda_host_register checks the device.
 - `--enable-deterministic-inference` (per-request sampling seeds) admits GPU attention backends only and
   installs Triton matmuls: `torch_native` is admitted and the matmuls stay. Bit-equal results then need
   `--max-running-requests 1`, see rollout/engine_command.py. Delete when SGLang has a deterministic CPU mode.
 - torch.compile is off: SGLang decorates small functions with it, and a compiler costs more than it gives.
 - the scheduler and the detokenizer are forked, not spawned: without CUDA nothing forbids it, and neither imports
   everything once more.
 - torch.cuda.synchronize does nothing: giving memory back ends with it, where a torch built for CUDA asks for a driver.
 - Megatron, which a debugging aid of SGLang's would import where it is installed, is not there.
 - SIGTERM is noticed at once, not up to 5 s later.
 - rotary embedding is computed in float32 and rounded once, as the trainer and SGLang's CUDA kernels do it; on a CPU
   SGLang rounds cosines and every product to the model's dtype. Delete when its forward_native keeps float32.
 - routed_scaling_factor of a bailing_moe_v2 is applied: on CUDA SGLang's kernels for experts do it, on a CPU nothing
   does (models/glm4_moe.py and deepseek_v2.py multiply by themselves). Delete when moe_forward_native does.
 - latent attention always goes by way of the latent vectors: for a prompt SGLang would take whole keys and values, and
   its torch_native backend reads these from a cache that holds latent vectors only, and stops. Delete when
   attention_backend_handler.py has a handler for torch_native.
 - latent attention without rope_scaling (Moonlight) gets the plain rotation. Delete when get_rope_cpu no longer asserts
   that there is a scaling (layers/rotary_embedding/factory.py).
 - the gate of a qwen2_moe's shared experts is torch's, since SGLang has a Triton kernel alone. Delete when
   models/qwen2_moe.py has another way on a CPU.
 - no memory is pinned for adapters (--enable-lora), which needs a GPU's driver. Delete when lora/layers.py and
   lora/backend/torch_backend.py ask is_pin_memory_available, as lora/mem_pool.py does.
 - decoding goes a batch at a time instead of sequence by sequence and expert by expert (sglang_cpu_batched.py).

Importing this module does nothing; prepare() comes before SGLang is imported.
"""

from __future__ import annotations

import asyncio
import importlib.machinery
import multiprocessing
import os
import sys
import types

import torch

from megatron_rl.compat import sglang_cpu_batched as batched
from megatron_rl.compat.quick_imports import quick_imports

SGLANG_VERSION = "0.5.23"
NOTICE_S = 0.1

UINT32 = 0xFFFFFFFF


class _MissingKernels(types.ModuleType):
    """Answers every `from sgl_kernel import name`; calling what came back raises.

    SGLang imports CPU functions by name, and calls them for speculative decoding or on Intel AMX only.
    """

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(f"sgl_kernel.{name} needs the compiled sgl-kernel, which has no CPU wheel")

        return missing


def _rotate_left(value: torch.Tensor, bits: int) -> torch.Tensor:
    return ((value << bits) | (value >> (32 - bits))) & UINT32


def _murmur3_mix(state: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    block = (_rotate_left((block * 0xCC9E2D51) & UINT32, 15) * 0x1B873593) & UINT32
    return (_rotate_left(state ^ block, 13) * 5 + 0xE6546B64) & UINT32


def murmur_hash32(seed_N: torch.Tensor, positions_N: torch.Tensor, columns_V: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 of (64-bit seed, 32-bit position, 32-bit column), uint32 [N, V].

    The CPU twin of sglang.kernels.ops.sampling.murmur_hash.murmur_hash32_kernel; 32-bit words in int64,
    where a product that overflows keeps its low 32 bits.
    """
    seed_N1 = seed_N.view(torch.int64)[:, None]
    state = torch.zeros_like(seed_N1)
    for block in (seed_N1 & UINT32, (seed_N1 >> 32) & UINT32, positions_N.to(torch.int64)[:, None] & UINT32,
                  columns_V.to(torch.int64)[None, :] & UINT32):
        state = _murmur3_mix(state, block)
    state = state ^ 16  # the length in bytes
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & UINT32
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & UINT32
    return (state ^ (state >> 16)).to(torch.uint32)


def _stand_in_for_sgl_kernel() -> None:
    module = _MissingKernels("sgl_kernel")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    module.library = torch.library.Library("sgl_kernel", "FRAGMENT")  # lives as long as the module
    module.library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
    module.library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    sys.modules["sgl_kernel"] = module


def _register_hooks() -> None:
    """Through SGLang's own plugin registry; load_plugins() applies them in every process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.mem_cache.pool_host.common._cuda_host_register",
        lambda buffer, granularity=None: None,
        HookType.REPLACE,
    )
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode",
        lambda self: None,
        HookType.REPLACE,
    )
    HookRegistry.register(
        "sglang.srt.entrypoints.engine._set_envs_and_config",
        lambda result, *args: multiprocessing.set_start_method("fork", force=True),
        HookType.AFTER,
    )
    HookRegistry.register(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.sigterm_watchdog", _stop_at_once, HookType.AROUND)
    attention = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
    HookRegistry.register(f"{attention}.init_forward_metadata", batched.forget_groups, HookType.AFTER)
    HookRegistry.register(f"{attention}._run_sdpa_forward_decode", batched.batched_decode, HookType.AROUND)
    HookRegistry.register(
        "sglang.srt.models.bailing_moe.BailingMoESparseMoeBlock._forward_router_experts", scale_routed, HookType.AROUND)
    HookRegistry.register("sglang.srt.models.deepseek_v2.DeepseekV2AttentionMLA.dispatch_attn_forward_method",
                          by_latent_vectors, HookType.REPLACE)
    HookRegistry.register("sglang.srt.layers.rotary_embedding.factory.get_rope_cpu", plain_or_scaled, HookType.AROUND)
    HookRegistry.register("sglang.srt.models.qwen2_moe.fused_gate_sigmoid_mul_add", add_gated, HookType.REPLACE)
    HookRegistry.register("sglang.srt.layers.rotary_embedding.base.apply_rotary_emb", rotate, HookType.AROUND)
    HookRegistry.register("sglang.srt.layers.moe.fused_moe_native.moe_forward_native", batched.grouped_experts,
                          HookType.AROUND)


def scale_routed(original, block, *args):
    """Around BailingMoESparseMoeBlock._forward_router_experts: what the routed experts give, times the factor."""
    return original(block, *args) * block.routed_scaling_factor


def by_latent_vectors(attention, forward_batch):
    """For DeepseekV2AttentionMLA.dispatch_attn_forward_method."""
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    attention.current_attention_backend = "torch_native"
    return AttnForwardMethod.MLA


def plain_or_scaled(original, head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling, *rest):
    """Around get_rope_cpu, which takes scaled rotations only."""
    from sglang.srt.layers.rotary_embedding.factory import get_rope

    if rope_scaling is None:
        return get_rope(head_size, rotary_dim, max_position, base, is_neox_style)
    return original(head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling, *rest)


def add_gated(hidden_TH: torch.Tensor, gate_H: torch.Tensor, shared_TH: torch.Tensor, out_TH: torch.Tensor) -> None:
    """For fused_gate_sigmoid_mul_add: out += sigmoid(hidden . gate) * shared, summed in float32, as there."""
    share_T1 = torch.sigmoid(hidden_TH.float() @ gate_H.float())[:, None]
    out_TH.copy_(out_TH.float() + share_T1 * shared_TH.float())


def rotate(original, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox_style: bool) -> torch.Tensor:
    """Around apply_rotary_emb, which casts cosines and sines to x's dtype: all of it in float32."""
    return original(x.float(), cos, sin, is_neox_style).to(x.dtype)


async def _stop_at_once(watchdog, manager) -> None:
    while not manager.gracefully_exit:
        await asyncio.sleep(NOTICE_S)
    await watchdog(manager)


def _admit_torch_native_for_deterministic_inference() -> None:
    from sglang.srt.arg_groups.choices import add_deterministic_attention_backend_choices

    add_deterministic_attention_backend_choices(["torch_native"])


def apply() -> None:
    """Adapts this process; call before anything of SGLang is imported."""
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ["SGLANG_ROPE_CACHE_FP32"] = "1"
    sys.modules["megatron.core"] = None  # an ImportError for who asks (sglang.srt.debug_utils.dumper)
    torch.cuda.synchronize = torch.cpu.synchronize
    _stand_in_for_sgl_kernel()
    _register_hooks()
    _admit_torch_native_for_deterministic_inference()


class _Unpinned:
    """torch for modules that pin memory, without doing so."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def tensor(self, *args, pin_memory: bool = False, **options) -> torch.Tensor:
        return torch.tensor(*args, **options)

    def zeros(self, *args, pin_memory: bool = False, **options) -> torch.Tensor:
        return torch.zeros(*args, **options)


def _pin_nothing() -> None:
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend

    layers.torch = torch_backend.torch = _Unpinned()
    torch.Tensor.pin_memory = lambda tensor, *_: tensor


def prepare() -> None:
    """apply(), and import all that the server imports."""
    with quick_imports():
        apply()
        import sglang.srt.entrypoints.http_server  # noqa: F401

        _pin_nothing()
