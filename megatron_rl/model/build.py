"""The policy as Megatron's GPTModel: built per pipeline stage, wrapped for mixed precision and data parallelism."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_rl.config.kernels import KernelConfig
from megatron_rl.config.lora import LoraConfig
from megatron_rl.config.schema import ModelConfig, ParallelConfig
from megatron_rl.model import backend
from megatron_rl.model.adapters import check_lora
from megatron_rl.model.config import transformer_config
from megatron_rl.model.lora import Adapters, attach
from megatron_rl.model.mtp import MultiTokenPrediction
from megatron_rl.model.network import Network, check_layout
from megatron_rl.model.router import BudgetRouter, RouterLosses
from megatron_rl.model.spec import block_spec


@dataclass
class Policy:
    """One rank's share of the network.

    chunks: what Megatron's schedules run, one per virtual stage; with gradients each is a
    DistributedDataParallel. gpt_models: the GPTModel inside each chunk. backend: what computes the layers' parts.
    fp32_lm_head, expert_bias_rate, lora: as configured. adapters: those of model.lora, or None. path: model.path.
    mtp: the layer behind the last, if model.mtp trains it; mtp_chunk: what holds its gradients, apart from `chunks`.
    """

    config: Network
    transformer: TransformerConfig
    chunks: list[torch.nn.Module]
    gpt_models: list[GPTModel]
    router_losses: RouterLosses
    backend: backend.Backend
    fp32_lm_head: bool
    expert_bias_rate: float = 0.0
    lora: LoraConfig = field(default_factory=LoraConfig)
    adapters: Adapters | None = None
    path: str = ""
    mtp: MultiTokenPrediction | None = None
    mtp_chunk: torch.nn.Module | None = None

    @property
    def moe_layers(self) -> list[int]:
        """The MoE layers that this rank holds, counted from 0 over those of the whole network."""
        return [router.router_replay.moe_layer for router in self.routers]

    @property
    def routers(self) -> list[BudgetRouter]:
        """Those of this rank's MoE layers, in order."""
        return _routers(self.gpt_models)

    @property
    def routes_twice(self) -> bool:
        """Whether a router runs again in the backward pass."""
        config = self.transformer
        return config.recompute_granularity == "full" or (
            config.recompute_granularity == "selective" and "moe" in config.recompute_modules)

    def train(self, mode: bool = True) -> None:
        for chunk in self.chunks:
            chunk.train(mode)


def _routers(modules: Iterable[torch.nn.Module]) -> list[BudgetRouter]:
    return [module for each in modules for module in each.modules() if isinstance(module, BudgetRouter)]


def build_policy(model: Network, options: ModelConfig, parallel: ParallelConfig, *,
                 with_gradients: bool) -> Policy:
    """The network of `model` on this rank, weights not yet loaded (convert.load_hf does that).

    with_gradients False builds a frozen copy (the reference policy): no gradient buffers, no DDP.
    """
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # its deprecation notice
    check_layout(model, parallel)
    gpu = backend.on_gpu()
    backend.check_backend(options, model, parallel, gpu=gpu)
    check_lora(options, model, gpu=gpu)
    _check_triton(options.kernels)
    chosen = backend.resolve(options, gpu=gpu)
    config = transformer_config(model, options, parallel, chosen)
    losses = RouterLosses()
    stages = range(parallel.vpp) if parallel.vpp else (None,)
    spec = partial(block_spec, model, config, losses, chosen, overlap=parallel.overlap_shared_experts)
    gpt_models = [_gpt_model(model, config, spec(stage), stage) for stage in stages]
    adapters = attach(gpt_models, options.lora) if options.lora.on else None
    chunks: list[torch.nn.Module] = [Float16Module(config, m) if config.bf16 else m for m in gpt_models]
    mtp = _mtp(model, config, chosen) if options.mtp else None
    for router in _routers([*gpt_models, *([] if mtp is None else [mtp])]):
        router._maintain_float32_expert_bias()  # Float16Module casts buffers too
    mtp_chunk = None
    if with_gradients:
        chunks = [_data_parallel(config, parallel, chunk) for chunk in chunks]
        # without overlap: Megatron's schedules say when a micro-batch is the last to the chunks that they run
        mtp_chunk = None if mtp is None else _data_parallel(config, replace(parallel, overlap=False), mtp)
    else:
        for module in (*chunks, *([] if mtp is None else [mtp])):
            module.requires_grad_(False)
    return Policy(model, config, chunks, gpt_models, losses, chosen, options.fp32_lm_head,
                  options.expert_bias_rate, options.lora, adapters, options.path, mtp, mtp_chunk)


WITH_TRITON = ("triton", "fused")
"""Choices of model.kernels that run kernels of rl_kernels."""


def _check_triton(kernels: KernelConfig) -> None:
    """ValueError, naming the key, where Triton could not run. The interpreter is how tests run it on a CPU."""
    chosen = [field.name for field in fields(kernels) if getattr(kernels, field.name) in WITH_TRITON]
    if chosen and not torch.cuda.is_available():
        from rl_kernels.triton_impl import INTERPRETED

        if not INTERPRETED:
            raise ValueError(f"model.kernels.{chosen[0]}={getattr(kernels, chosen[0])} needs a GPU, and there is none; "
                             "leave it at auto")


def _gpt_model(model: Network, config: TransformerConfig, spec, stage: int | None) -> GPTModel:
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage)
    gpt = GPTModel(
        config=config, transformer_layer_spec=spec, vocab_size=model.vocab_size,
        max_sequence_length=model.max_position_embeddings, pre_process=first, post_process=last, parallel_output=True,
        share_embeddings_and_output_weights=model.tie_word_embeddings, vp_stage=stage,
        position_embedding_type="none")  # the attention rotates, see model/attention.py
    return gpt.cuda() if torch.cuda.is_available() else gpt


def _mtp(model: Network, config: TransformerConfig, chosen: backend.Backend) -> MultiTokenPrediction:
    mtp = MultiTokenPrediction(model, config, chosen)
    mtp = mtp.bfloat16() if config.bf16 else mtp  # as Float16Module does
    return mtp.cuda() if torch.cuda.is_available() else mtp


def _data_parallel(config: TransformerConfig, parallel: ParallelConfig, chunk: torch.nn.Module):
    # overlap_param_gather stays off: it would leave weights stale until the next forward, and we publish before that
    options = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.distributed_optimizer, grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap)
    return DistributedDataParallel(config, options, chunk)
