"""Megatron's (distributed) AdamW and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_rl.compat import multi_tensor
from megatron_rl.config.schema import OptimizerConfig, ParallelConfig
from megatron_rl.model.build import Policy
from megatron_rl.model.host_states import HostStates
from megatron_rl.topology import Topology

multi_tensor.use_foreach()


def build_optimizer(policy: Policy, options: OptimizerConfig, parallel: ParallelConfig,
                    chunks: Sequence[torch.nn.Module] | None = None):
    """Megatron's optimiser over `chunks` (None: the policy's), one for dense and one for expert parameters."""
    bf16 = policy.transformer.bf16
    config = MegatronOptimizerConfig(
        optimizer="adam", lr=options.lr, weight_decay=options.weight_decay, adam_beta1=options.beta1,
        adam_beta2=options.beta2, adam_eps=options.eps, clip_grad=options.clip_grad, bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=parallel.distributed_optimizer)
    optimizer = get_megatron_optimizer(config, list(chunks or policy.chunks), use_gloo_process_groups=False)
    for group in optimizer.param_groups:
        # only Megatron's OptimizerParamScheduler.step, which we do not use, spares vectors (wd_mult 0) from the decay
        group["weight_decay"] = options.weight_decay * group["wd_mult"]
    for each in optimizer.chained_optimizers:
        each._defer_param_sync = True  # apply_gradients gathers
    return optimizer


def settle(optimizer, policy: Policy, *, offload: bool, modules: Sequence[torch.nn.Module] | None = None) -> None:
    """To be called once when the policy has its weights: the optimiser's float32 copies follow them.

    offload: the states then go to the host (host_states.py), and every step visits the device slice by slice.
    modules: what the optimiser trains; None: the policy's models.
    """
    if policy.transformer.bf16:
        optimizer.reload_model_params()
    if offload:
        parameters = [parameter for module in modules or policy.gpt_models for parameter in module.parameters()]
        optimizer.step_with_ready_grads = HostStates(optimizer, parameters).step


def build_mtp_optimizer(policy: Policy, options: OptimizerConfig, parallel: ParallelConfig, *, offload: bool = False):
    """The optimiser of the layer behind the last, settled, by the same options; None without model.mtp."""
    if policy.mtp is None or policy.mtp_chunk is None:
        return None
    optimizer = build_optimizer(policy, options, parallel, [policy.mtp_chunk])
    settle(optimizer, policy, offload=offload, modules=[policy.mtp])
    return optimizer


def chained(optimizer, mtp_optimizer):
    """Both as one, as checkpoints want them."""
    if mtp_optimizer is None:
        return optimizer
    return ChainedOptimizer([*optimizer.chained_optimizers, *mtp_optimizer.chained_optimizers])


def gradient_norm(optimizer, topology: Topology) -> float:
    """The norm of the last backward pass's gradients, the same on every rank; not finite if it is so on any."""
    optimizer.prepare_grads()  # main_grad to where the norm is read
    norms = topology.gather_objects(float(optimizer.get_grad_norm()))
    return next((norm for norm in norms if not math.isfinite(norm)), norms[0])


def apply_gradients(optimizer, chunks: Sequence[torch.nn.Module], norm: float) -> None:
    """Clips by `norm`, steps, and gathers the weights: ChainedOptimizer.step from where it knows the norm.

    Megatron's own takes the norm a second time, and there each of the two optimisers gathers all weights, its own and
    the other's (Megatron-Core 0.19.2, DistributedOptimizer.step_with_ready_grads; Megatron-LM issue 3284).
    """
    for each in optimizer.chained_optimizers:
        if optimizer.config.clip_grad > 0 and (parameters := each.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, max_norm=optimizer.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    for chunk in chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync()


def learning_rate(step: int, total_steps: int, options: OptimizerConfig) -> float:
    """Rate of optimiser step `step` (from 0): linear warm-up, then constant or cosine to lr * min_lr_ratio."""
    warmup = options.warmup_steps
    if options.warmup_fraction is not None:
        warmup = max(1, round(options.warmup_fraction * total_steps))
    if step < warmup:
        return options.lr * (step + 1) / warmup
    if options.schedule == "constant":
        return options.lr
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    floor = options.min_lr_ratio
    return options.lr * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))
