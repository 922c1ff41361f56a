"""What a rank of the trainer leaves to engines on its GPU: once it is built, and when a step is over."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_rl.trainer import main
from megatron_rl.trainer.main import Trainer


@pytest.mark.parametrize(("colocate", "expected"), [
    (True, ["engines release", "build", "release gradients"]), (False, ["build"])])
def test_the_policy_is_built_while_engines_on_its_gpu_hold_nothing(colocate, expected, tmp_path, monkeypatch):
    done: list[str] = []
    config = SimpleNamespace(
        run=SimpleNamespace(dir=tmp_path), model=SimpleNamespace(path="a model"),
        rollout=SimpleNamespace(publish="tensor", engine=SimpleNamespace(colocate=colocate, urls=["http://one"])))
    learner = SimpleNamespace(policy=None, optimizer=None, exporter=None,
                              step=SimpleNamespace(release_gradients=lambda: done.append("release gradients")))
    replaced = {
        "build": lambda config: config, "read_config": lambda path: None,
        "Checkpoints": lambda *_: SimpleNamespace(restore=lambda checkpoint: None),
        "Probe": lambda *_: SimpleNamespace(token_ids=torch.zeros(1)),
        "Sender": lambda *_: SimpleNamespace(make_room=lambda urls: done.append("engines release")),
        "PolicyLearner": lambda *_: done.append("build") or learner}
    for name, replacement in replaced.items():
        monkeypatch.setattr(main, name, replacement)
    monkeypatch.setattr(Trainer, "_check_shared", lambda self, written: None)
    monkeypatch.setattr(Trainer, "_check_memory", lambda self: None)
    here = SimpleNamespace(is_main=True, device=torch.device("cpu"), barrier=lambda: None)
    Trainer(here, SimpleNamespace(), SimpleNamespace(doing=""))._start(config, None, None, 1, False)
    assert done == expected


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize(("colocate", "gpu", "expected"), [
    (True, True, ["learn", "release gradients", "empty cache"]), (True, False, ["learn", "release gradients"]),
    (False, True, ["learn"])])
def test_every_rank_leaves_the_gpu_to_the_engines_before_it_says_that_the_step_is_done(
        is_main, colocate, gpu, expected, tmp_path, monkeypatch):
    """The orchestrator publishes after all ranks have answered, and the engines' memory comes back then."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty cache"))
    trainer = Trainer(SimpleNamespace(is_main=is_main), SimpleNamespace(shard=lambda step: []),
                      SimpleNamespace(doing=""))
    trainer._config = SimpleNamespace(
        run=SimpleNamespace(dir=tmp_path), rollout=SimpleNamespace(engine=SimpleNamespace(colocate=colocate)))
    trainer._checkpoints = SimpleNamespace(poll=lambda: None)
    trainer._learner = SimpleNamespace(
        learn=lambda updates, timers: done.append("learn") or [],
        step=SimpleNamespace(release_gradients=lambda: done.append("release gradients")))
    trainer.execute({"kind": "train", "step": 0})
    assert done == expected
