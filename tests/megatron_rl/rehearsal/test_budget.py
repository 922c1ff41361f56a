"""Faults planted into a rehearsed step turn a budget red, and the message names the planted line."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_rl.model.adam_state import DistributedOptimizer  # megatron_rl is imported before megatron.core
from megatron_rl.model.spec import RMSNorm
from megatron_rl.rehearsal.budget import figures, grown
from tests.megatron_rl.rehearsal.tiny import rehearsed, tiny_config

HERE = "tests/megatron_rl/rehearsal/test_budget.py"


@pytest.fixture(scope="module")
def allowed() -> dict:
    return figures(rehearsed(tiny_config(world_size=4, ep=2)))


def planted(monkeypatch, owner, name, plant) -> dict:
    original = getattr(owner, name)

    def with_fault(self, *args):
        result = original(self, *args)
        plant(result)
        return result

    monkeypatch.setattr(owner, name, with_fault)
    return rehearsed(tiny_config(world_size=4, ep=2))


def test_the_step_as_it_is_keeps_the_budget_and_less_passes(allowed):
    found = rehearsed(tiny_config(world_size=4, ep=2))
    assert grown(allowed, found) == []
    roomier = {**allowed, "peak_bytes": {phase: size + 1 for phase, size in allowed["peak_bytes"].items()}}
    assert grown(roomier, found) == []


def test_a_forgotten_tensor_is_named(allowed, monkeypatch):
    kept = []
    messages = grown(allowed, planted(monkeypatch, RMSNorm, "forward", lambda out: kept.append(out.detach().clone())))
    assert kept
    update = next(message for message in messages if message.startswith("update: peak"))
    assert HERE in update and "aten.clone" in update


def test_a_second_all_gather_is_named(allowed, monkeypatch):
    def gather(_):
        dist.all_gather_into_tensor(torch.empty(64), torch.empty(16))

    messages = grown(allowed, planted(monkeypatch, DistributedOptimizer, "step_with_ready_grads", gather))
    message = next(message for message in messages if "all-gather over world" in message)
    assert message.startswith("optimiser step: ") and HERE in message and "(gather)" in message


def test_a_read_by_the_host_is_named(allowed, monkeypatch):
    messages = grown(allowed, planted(monkeypatch, RMSNorm, "forward", lambda out: out.sum().item()))
    update = next(message for message in messages if message.startswith("update: the host waits"))
    assert HERE in update
