"""What an orchestrator leaves behind is what its successor reads."""

from __future__ import annotations

import numpy as np

from megatron_rl.orchestrator.state import OfferedStep, read_offered


def test_an_offered_step_is_read_back_whole(tmp_path):
    assert read_offered(tmp_path) is None
    shards = [b"", bytes(range(256)) * 3, b"\x00", b""]
    step = OfferedStep(7, shards, {"reward/mean": 0.5}, [{"text": "\u00e9"}], 1e15, 2.5, {"prompts": np.arange(3)})
    step.write(tmp_path)
    again = read_offered(tmp_path)
    assert again.collector["prompts"].tolist() == [0, 1, 2]
    assert (again.step, again.shards, again.metrics, again.samples, again.flops, again.generate_s) == (
        step.step, step.shards, step.metrics, step.samples, step.flops, step.generate_s)
