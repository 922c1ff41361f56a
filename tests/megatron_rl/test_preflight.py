"""What is refused, or said, before anything is started."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from megatron_rl.config.load import load
from megatron_rl.model.architectures import read_config
from megatron_rl.plan import plan_memory
from megatron_rl.preflight import check_memory, network_of
from tests.tiny_models import write_tiny_bailing


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the GPU's memory there")
def test_a_run_that_cannot_fit_is_refused_and_one_that_might_not_is_warned_about(tmp_path, monkeypatch, capsys):
    model = write_tiny_bailing(tmp_path / "model")
    config = load([f"model.path={model}", "parallel=dp2"])
    plan = plan_memory(read_config(config.model.path), config)

    def on_a_machine_of(total: int) -> str:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total))
        check_memory(config)
        return capsys.readouterr().err

    with pytest.raises(ValueError, match="parallel.world_size=2 ranks take .*`megatron-rl plan`"):
        on_a_machine_of(2 * plan.stays - 1)
    assert "at their peak" in on_a_machine_of(2 * plan.stays)
    assert on_a_machine_of(2 * plan.total) == ""


@pytest.mark.parametrize(("experiment", "how"), [("quickstart", "make quickstart"), ("smollm2", "convert smollm2")])
def test_a_model_still_to_be_made_is_said_with_the_command_that_makes_it(experiment, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"model.path=.* is not there yet: `.*{how}"):
        network_of(load([f"experiment={experiment}"]))
