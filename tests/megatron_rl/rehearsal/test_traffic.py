"""What Megatron-Core as released keeps, sends and waits for beyond need, and this trainer does not."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

from megatron_rl.compat import multi_tensor
from megatron_rl.model.routing_replay import RoutedMoELayer
from megatron_rl.train_step import step
from tests.megatron_rl.rehearsal.tiny import rehearsed, tiny_config


def found() -> dict:
    config = tiny_config(world_size=4, ep=2)
    return rehearsed(dataclasses.replace(config, model=dataclasses.replace(config.model, recompute="full")))


ours = cache(found)


def kept_of_layers(summary: dict) -> list[str]:
    """Places that made activations, such as the gradient of a recomputed layer's input."""
    return [each["where"] for each in summary["census"]["optimiser step"] if each["kind"] == "activations"]


def gathered(summary: dict) -> int:
    return sum(each["bytes"] for each in summary["collectives"]
               if each["phase"] == "optimiser step" and each["operation"] == "all-gather")


def test_nothing_of_a_layer_is_alive_after_its_backward_pass(monkeypatch):
    assert kept_of_layers(ours()) == []
    monkeypatch.setattr(RoutedMoELayer, "forget", lambda self: None)
    assert kept_of_layers(found()) != [], "Megatron lets go by itself now: delete forget"


def test_each_weight_is_gathered_once(monkeypatch):
    weights = ours()["plan"]["weights"]["rehearsed"]
    assert gathered(ours()) == weights
    apply = step.apply_gradients

    def megatrons(optimizer, chunks, norm):
        for each in optimizer.chained_optimizers:
            each._defer_param_sync = False
        for chunk in chunks:
            monkeypatch.setattr(chunk, "start_param_sync", lambda: None)
        apply(optimizer, chunks, norm)

    monkeypatch.setattr(step, "apply_gradients", megatrons)
    assert gathered(found()) == 2 * weights, "Megatron gathers once now: delete what defers it"


@pytest.mark.parametrize(("phase", "most"), [("metrics", 2), ("optimiser step", 0)])
def test_the_host_waits_a_handful_of_times(phase, most):
    assert ours()["phases"][phase]["host_reads"] <= most


def test_norm_and_scaling_are_megatrons():
    tensors = [torch.randn(7, 5), torch.randn(300), torch.zeros(0), torch.randn(1) * 1e4]
    ours_, theirs = ([tensor.clone() for tensor in tensors] for _ in range(2))
    norm, expected = (each(0, None, [tensors], False)[0]
                      for each in (multi_tensor.l2_norm, multi_tensor.utils.local_multi_tensor_l2_norm))
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    multi_tensor.scale(0, None, [ours_, ours_], 0.3)
    multi_tensor.utils.local_multi_tensor_scale(0, None, [theirs, theirs], 0.3)
    assert all(torch.equal(one, other) for one, other in zip(ours_, theirs, strict=True))
