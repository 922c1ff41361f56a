"""Supervised fine-tuning on prompt-response pairs: the same packed Megatron step with a token-level mean loss."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import numpy as np
import torch

from c3po import SumCount
from megatron_rl import topology
from megatron_rl.config.load import to_dict
from megatron_rl.config.schema import Config
from megatron_rl.data import PromptSource
from megatron_rl.model import checkpoint_files
from megatron_rl.model.adapter_folder import ADAPTER_FOLDER
from megatron_rl.model.checkpoint import Checkpoints
from megatron_rl.model.convert import Exporter
from megatron_rl.model.router import RoutingCounts
from megatron_rl.model.tokenizer import load_tokenizer
from megatron_rl.observe import MetricsLog, reduce_metrics
from megatron_rl.observe.dump import StepInputs
from megatron_rl.observe.files import write_json
from megatron_rl.prompts import sft_source
from megatron_rl.train_step.optimizer import learning_rate
from megatron_rl.train_step.step import TrainStep
from megatron_rl.trainer.export import export, export_adapters
from megatron_rl.trainer.guarded import GuardedStep
from megatron_rl.trainer.learner import build_trainable, packed_microbatches
from megatron_rl.types import PackedMicrobatch, TrainSample

EPOCH = "epoch.json"
"""In each folder of sft.export_epochs: epoch, step, and tokens (prompts and responses) that it was trained on."""


def run(config: Config) -> None:
    """sft.epochs passes over the first sft.examples of `data`; a checkpoint per epoch, and <run.dir>/hf at the end."""
    here = topology.start(config.parallel, seed=config.run.seed)
    policy, optimizer, step = build_trainable(config, here, temperature=1.0)
    checkpoints = Checkpoints(config.run, policy, optimizer, here)
    state = checkpoints.restore(here.broadcast_object(checkpoint_files.choose(config.run) if here.is_main else None))
    exporter = Exporter(policy, here)
    guarded = GuardedStep(config, here, step, exporter, temperature=1.0)
    source = sft_source(config, load_tokenizer(config.model))
    options = config.sft
    per_epoch = options.steps_per_epoch
    room = config.batch.tokens_per_microbatch * config.parallel.cp
    done, tokens = (0, 0) if state is None else (state["step"], state["tokens"])
    with contextlib.ExitStack() as stack:
        log = None
        if here.is_main:
            log = stack.enter_context(MetricsLog(config.run.dir, config.observe, to_dict(config),
                                                 resume_step=done if config.run.resume else None))
        for epoch in range(done // per_epoch, options.epochs):
            order = np.random.default_rng([config.run.seed, epoch]).permutation(options.examples)
            for index in range(done - epoch * per_epoch, per_epoch):
                started = time.perf_counter()
                chosen = order[index * options.batch_size:(index + 1) * options.batch_size]
                samples = [sft_sample(source, int(i), room) for i in chosen]
                microbatches = packed_microbatches(samples, config, here, policy.config)
                counts = load_of_step(step, microbatches, options.balance_coef)
                objective = TokenMeanLoss(sum(int(s.loss_mask.sum()) for s in samples))
                lr = learning_rate(done, options.schedule_steps, config.optimizer)
                done += 1
                result = guarded.update(done, StepInputs(microbatches, objective, counts, options.balance_coef,
                                                         options.z_loss_coef), lr=lr)
                checkpoints.poll()
                in_step = sum(len(sample.token_ids) for sample in samples)
                tokens += in_step
                if log is not None:
                    log.log(done, {**reduce_metrics(result.sums, None), **result.gauges,
                                   "train/selected_tokens": sum(int(each.loss_mask.sum()) for each in samples),
                                   "tokens_per_s/train": in_step / (time.perf_counter() - started)})
            if options.export_epochs:  # before its checkpoint, from which a killed run goes on with the next epoch
                folder = epoch_folder(config, epoch + 1)
                export(config, exporter, here, folder)
                if here.is_main:
                    write_json(folder / EPOCH, {"epoch": epoch + 1, "step": done, "tokens": tokens})
            checkpoints.save(done, {"epoch": epoch + 1, "tokens": tokens})
        checkpoints.finish()
        if config.run.export_hf:
            export(config, exporter, here, Path(config.run.dir) / "hf")
            export_adapters(config, policy, here, Path(config.run.dir) / ADAPTER_FOLDER)
    topology.stop()


def load_of_step(step: TrainStep, microbatches: list[PackedMicrobatch], balance_coef: float) -> RoutingCounts | None:
    """How the whole step loads each expert, which the balance loss needs before the first gradient: from a pass without
    one. None if no such pass is needed: one micro-batch on each rank is the whole step."""
    if len(microbatches) == 1 or balance_coef == 0 or step.policy.config.num_moe_layers == 0:
        return None
    return step.count_routing(microbatches)[1]


def epoch_folder(config: Config, epoch: int) -> Path:
    """Where sft.export_epochs writes the policy after `epoch` epochs."""
    return Path(config.run.dir) / "epochs" / f"epoch_{epoch:02d}"


def sft_sample(source: PromptSource, index: int, room: int) -> TrainSample:
    """Example `index` with its response as the trained tokens. ValueError if it has more than `room` tokens."""
    prompt, response = source.sft_example(index)
    tokens = np.asarray([*prompt.token_ids, *response], dtype=np.int32)
    if len(tokens) > room:
        raise ValueError(f"{prompt.id}: prompt and response have {len(tokens)} tokens, {room} fit: raise "
                         "batch.tokens_per_microbatch (or parallel.cp), or remove the example")
    mask = np.arange(len(tokens)) >= len(prompt.token_ids)
    return TrainSample(index=index, token_ids=tokens, loss_mask=mask,
                       rollout_logprobs=np.zeros(len(tokens), dtype=np.float32), advantage=0.0,
                       num_response_tokens=len(response))


class TokenMeanLoss:
    """-(sum of log-probabilities of the step's response tokens) / their number; slices add up."""

    def __init__(self, num_tokens: int):
        self._num_tokens = num_tokens

    def __call__(self, batch: PackedMicrobatch, logprobs_T: torch.Tensor, entropy_T: torch.Tensor):
        masked = torch.where(batch.loss_mask, logprobs_T, 0.0)
        entropy = torch.where(batch.loss_mask, entropy_T.detach(), 0.0)
        count = batch.loss_mask.sum()
        return -masked.sum() / self._num_tokens, {"entropy": SumCount(entropy.sum(), count)}
