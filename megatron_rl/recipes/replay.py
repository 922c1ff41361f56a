"""A dumped optimiser step again: same ranks, weights and micro-batches, and where it stops being finite."""

from __future__ import annotations

from pathlib import Path

from megatron_rl import topology
from megatron_rl.config.schema import Config
from megatron_rl.observe import dump
from megatron_rl.observe.files import write_json
from megatron_rl.train_step.watch import Finding, Watch
from megatron_rl.trainer.learner import build_trainable


def run(config: Config) -> None:
    """run.dir is the dump and model.path the weights in it; writes <run.dir>/replay.json."""
    folder = Path(config.run.dir)
    record = dump.read_record(folder)
    here = topology.start(config.parallel, seed=config.run.seed)
    policy, _, step = build_trainable(config, here, temperature=record.temperature)
    inputs = dump.read_rank(folder, here.rank, here.device)
    watch = Watch(policy, here, inputs.microbatches)
    with watch.hooked():
        step.backward(inputs.microbatches, watch.objective(inputs.objective), balance_coef=inputs.balance_coef,
                      z_loss_coef=inputs.z_loss_coef, counts=inputs.counts)
    watch.look_at_gradients()
    result = step.measure()
    findings = sorted(finding for rank in here.gather_objects(watch.findings) for finding in rank)
    if here.is_main:
        write_json(folder / dump.RESULT, {
            "loss": result.gauges["train/loss"], "grad_norm": result.gauges["train/grad_norm"],
            "first": [finding.text() for finding in first_of_each_phase(findings)]})
    topology.stop()


def first_of_each_phase(findings: list[Finding]) -> list[Finding]:
    """The earliest of each phase; the first of all is where the step went wrong."""
    return list({finding.phase: finding for finding in reversed(findings)}.values())[::-1]
