"""What ranks on several machines find out before they build the policy: one that cannot take part is named."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_rl.config.load import load
from megatron_rl.model.architectures import read_config
from megatron_rl.plan import plan_memory
from megatron_rl.trainer import main
from megatron_rl.trainer.main import Trainer
from tests.tiny_models import write_tiny_bailing


def trainer(tmp_path: Path, gather, *more: str) -> SimpleNamespace:
    config = load([f"model.path={write_tiny_bailing(tmp_path / 'model')}", f"run.dir={tmp_path}", *more])
    return SimpleNamespace(_config=config, _here=SimpleNamespace(rank=3, gather_objects=gather))


def test_a_rank_that_does_not_see_a_folder_ends_all_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(main, "APPEARS_S", 0.5)
    mine, written = trainer(tmp_path, lambda value: [None, value]), tmp_path / "written.1"
    written.touch()
    Trainer._check_shared(mine, str(written))
    written.unlink()
    name = os.uname().nodename
    with pytest.raises(ValueError, match=f"rank 3 on {name} does not see run.dir={tmp_path} .it lacks {written}"):
        Trainer._check_shared(mine, str(written))
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ValueError, match=f"does not see model.path={tmp_path}/model: every machine"):
        Trainer._check_shared(mine, None)
    theirs = trainer(tmp_path / "other", lambda value: ["rank 0 on n9 does not see model.path=x", value])
    with pytest.raises(ValueError, match="rank 0 on n9 does not see model.path=x: every machine"):
        Trainer._check_shared(theirs, None)


@pytest.mark.parametrize(("key", "more"), [
    ("model.reference_path", ["model.reference_path=FOLDER"]),
    ("model.lora.path", ["model.lora={rank: 4, path: FOLDER}"]),
    ("algo.distillation.teachers.a.checkpoint", ["algo.distillation.teachers={a: {checkpoint: FOLDER}}"])])
def test_every_folder_of_weights_is_looked_for_on_every_machine(key, more, tmp_path):
    """A rank that failed over it alone would leave the others waiting."""
    folder = tmp_path / "weights"
    mine = trainer(tmp_path, lambda value: [None, value], *(each.replace("FOLDER", str(folder)) for each in more))
    with pytest.raises(ValueError, match=f"does not see {key}={folder}: every machine"):
        Trainer._check_shared(mine, None)
    folder.mkdir()
    (folder / ("adapter_config.json" if "lora" in key else "config.json")).touch()
    Trainer._check_shared(mine, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the memory of a machine without GPUs")
@pytest.mark.parametrize("others", [["n9"], []])
def test_a_machine_with_too_little_memory_for_its_ranks_is_named(others, tmp_path, monkeypatch):
    here = os.uname().nodename
    mine = trainer(tmp_path, lambda value: [*others, here, here] if value == here else [None, value])
    stays = plan_memory(read_config(mine._config.model.path), mine._config).stays
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2 * stays))
    Trainer._check_memory(mine)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2 * stays - 1))
    with pytest.raises(ValueError, match=f"of 2 ranks take .* and {here} has"):
        Trainer._check_memory(mine)
