"""The processes behind test_router_replay.py: experts given and experts recorded, replayed in many layouts.

`python -m tests.distributed.replay_worker FOLDER WORLD_SIZE LAYOUT...`; FOLDER holds step.pt (no experts given),
given.pt (experts given) and the checkpoints norm_head_True and later; rank 0 writes LAYOUT.pt there.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

import tests.distributed.cases as cases
from megatron_rl import topology
from megatron_rl.batch import by_sample
from megatron_rl.model.convert import load_hf
from megatron_rl.model.routing_replay import LayerReplay, RoutedTransformerLayer
from tests.distributed.worker import Runner, main, microbatches_of, token_loss

COUNTS = (2, 4)


def recorded(runner: Runner, batches: list) -> list[torch.Tensor]:
    """int64 [L-1, M, k] of every sequence: what all ranks have recorded of it, added."""
    own = {index: value for batch in batches
           for index, value in zip(batch.sample_indices, by_sample(batch, batch.routed_experts.long()), strict=True)}
    parts = runner.here.gather_objects(own)
    return [sum(part[index] for part in parts if index in part) for index in range(len(runner.step.token_ids))]


def record_and_replay(runner: Runner, folder: Path) -> dict:
    """Experts recorded under the first weights, the gradient when they are replayed under later ones."""
    batches = microbatches_of(runner.step, runner.here, runner.layout, cases.UPDATE_MICROBATCHES)
    _, counts = runner.train_step.count_routing(batches, record=True)
    experts = recorded(runner, batches)
    load_hf(runner.policy, runner.here, folder / "later")
    result = {"experts": experts, "gradients": runner.gradients_of(batches, counts)}
    load_hf(runner.policy, runner.here, folder / "norm_head_True")
    return result


@contextmanager
def fault(name: str):
    """skipped: one router does not ask for its record, once. stale: a layer that runs again in the backward pass keeps
    what the latest forward left, as one global target per layer would."""
    choose, forward, multiple = LayerReplay.get_replay_topk, RoutedTransformerLayer.forward, cases.PACK_MULTIPLE
    skipped = []

    def skip(self, scores, topk, num_groups, group_topk, default_compute_topk):
        if self.moe_layer == 1 and not skipped:
            skipped.append(self)
            return default_compute_topk(scores, topk)
        return choose(self, scores, topk, num_groups, group_topk, default_compute_topk)

    def keep(self, *args, **kwargs):
        if torch.is_grad_enabled():
            latest = self.mlp.router.router_replay.microbatch
            kwargs["packed_seq_params"] = replace(kwargs["packed_seq_params"], routing=latest)
        return forward(self, *args, **kwargs)

    cases.PACK_MULTIPLE = 128  # equal shapes, so that a wrong record is not found by its length
    if name == "skipped":
        LayerReplay.get_replay_topk = skip
    elif name == "stale":
        RoutedTransformerLayer.forward = keep
    try:
        yield
    finally:
        LayerReplay.get_replay_topk, RoutedTransformerLayer.forward, cases.PACK_MULTIPLE = choose, forward, multiple


def refused(runner: Runner, name: str) -> bool:
    """Whether some rank's check of its records fails under this fault; it comes after all communication."""
    failed = False
    with fault(name):
        batches = microbatches_of(runner.step, runner.here, runner.layout, max(COUNTS))
        try:
            runner.train_step.backward(batches, token_loss, balance_coef=0.0, z_loss_coef=0.0, counts=None)
        except AssertionError as error:
            failed = "routing records" in str(error)
    return any(runner.here.gather_objects(failed))


def chosen_differ(runner: Runner) -> bool:
    """Whether some rank's log-probabilities of chosen tokens, here the labels, come from other experts than given."""
    batches = microbatches_of(runner.step, runner.here, runner.layout, 2)
    for batch in batches:
        batch.teacher_ids = batch.labels[:, None]
    found = zip(runner.train_step.logprobs(batches), runner.train_step.chosen_logprobs(batches), strict=True)
    return any(runner.here.gather_objects(not all(torch.equal(one, chosen[:, 0]) for one, (_, chosen) in found)))


def run_layout(folder: Path, layout: str, here: topology.Topology) -> None:
    given = torch.load(folder / "given.pt", weights_only=False)
    result: dict = {"given": {}, "recorded": {}}
    for recompute in ("none", "selective", "full"):
        runner = Runner(folder, layout, here, distributed_optimizer=False, recompute=recompute)
        result["recorded"][recompute] = record_and_replay(runner, folder)
        runner.step = given
        result["given"][recompute] = {count: runner.gradients(count) for count in COUNTS}
        result["chosen_differ"] = chosen_differ(runner)
        if recompute == "full":
            result["report"] = runner.update(cases.UPDATE_MICROBATCHES)["sums"]
            result["refused"] = {name: refused(runner, name) for name in ("none", "skipped", "stale")}
    if here.is_main:
        torch.save(result, folder / f"{layout}.pt")


if __name__ == "__main__":
    main(run_layout, *sys.argv[1:])
