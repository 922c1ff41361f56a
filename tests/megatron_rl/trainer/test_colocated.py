"""What a rank of the trainer leaves behind when a step is over, with engines on its GPU and without."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_rl.trainer.main import Trainer


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
