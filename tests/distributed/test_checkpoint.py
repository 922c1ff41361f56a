"""A checkpoint saved in one layout resumes in any other with every element equal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rl.model.adapters import matrix_slots
from megatron_rl.model.architectures import read_config
from megatron_rl.model.checkpoint_files import read_manifest
from tests.distributed.checkpoint_cases import LOOP_STATE, LORA, PAIRS, ROLLOUTS, SOURCES
from tests.distributed.conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
TIMEOUT_S = 800
KINDS = ("model", "weight", "exp_avg", "exp_avg_sq")
pairs = pytest.mark.parametrize(("source", "target"), [(source, target.name) for source, target in PAIRS])


@pytest.fixture(scope="module")
def folder(layouts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("checkpoints")
    for network in {case.network for case in SOURCES} - {""}:
        layouts.network(network)
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.distributed.checkpoint_worker", str(layouts.folder), str(out)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def result(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=False)


@pairs
def test_weights_and_moments_are_equal_element_by_element_in_another_layout(folder, source, target):
    saved, resumed = result(folder, source), result(folder, f"{source}-{target}")
    for kind in KINDS:
        assert saved["state"][kind].keys() == resumed["state"][kind].keys()
        differing = [name for name, tensor in saved["state"][kind].items()
                     if not torch.equal(tensor, resumed["state"][kind][name])]
        assert differing == [], kind
        assert all(tensor.abs().sum() > 0 for tensor in saved["state"][kind].values())
    assert resumed["steps"] == saved["steps"] == 2


@pairs
def test_the_next_step_is_the_one_that_would_have_followed(folder, source, target):
    """Bit for bit in the same layout; in another one, sums are taken in another order."""
    saved, resumed = result(folder, source)["next"], result(folder, f"{source}-{target}")["next"]
    for kind in KINDS:
        for name, tensor in saved[kind].items():
            if source.removesuffix("_offload") == target.removesuffix("_offload"):
                assert torch.equal(tensor, resumed[kind][name]), name
            elif "bf16" not in source:
                scale = tensor.abs().max()
                assert (tensor - resumed[kind][name]).abs().max() <= 2e-5 * scale, (kind, name)


@pytest.mark.parametrize("plain", ["ep2", "ep2_bf16", "tp2_pp2_ep2_plain_bf16"])
def test_states_on_the_host_and_released_gradients_change_no_bit_of_weights_and_moments(folder, plain):
    """Three steps, with the distributed optimiser and without, in float32 and with float32 copies of bfloat16."""
    on_device, on_host = result(folder, plain), result(folder, f"{plain}_offload")
    for moment in ("state", "next"):
        for kind in KINDS:
            for name, tensor in on_device[moment][kind].items():
                assert torch.equal(tensor, on_host[moment][kind][name]), (moment, kind, name)
    assert any(not torch.equal(tensor, on_host["next"]["model"][name])
               for name, tensor in on_host["state"]["model"].items())


@pytest.mark.parametrize("other", [case.name for case in SOURCES if "bf16" not in case.name and case.layout != "one"
                                   and not case.lora.on and not case.network])
def test_what_is_saved_is_the_state_of_adam(folder, other):
    """All layouts trained the same two steps, so their states are one state up to rounding."""
    reference, found = result(folder, "one")["state"], result(folder, other)["state"]
    for kind in KINDS:
        for name, tensor in reference[kind].items():
            assert (tensor - found[kind][name]).abs().max() <= 2e-5 * tensor.abs().max(), (kind, name)


def test_a_checkpoint_of_adapters_holds_nothing_else_and_names_its_base(folder, layouts):
    manifest = read_manifest(next((folder / "ep2_lora" / "checkpoints").glob("step_*")))
    matrices = matrix_slots(read_config(layouts.folder / "norm_head_True"), LORA).values()
    assert set(manifest["parameters"]) == {slot.key for slot in matrices}
    assert manifest["adapters"]["base"]["path"] == str(layouts.folder / "norm_head_True")


@pairs
def test_loop_state_and_rollouts_come_back_on_rank_0(folder, source, target):
    state = result(folder, f"{source}-{target}")["loop_state"]
    assert {key: state[key] for key in LOOP_STATE} == LOOP_STATE and state["step"] == 2
    assert state["rollouts"]["prompts"] == ROLLOUTS["prompts"]
    np.testing.assert_array_equal(state["rollouts"]["carried"][0], ROLLOUTS["carried"][0])


def test_random_states_go_on_in_the_same_layout_and_are_seeded_in_another(folder):
    saved = result(folder, "ep2")["random"]
    assert len(set(saved)) == 2  # each rank had its own
    assert result(folder, "ep2-ep2")["random"] == saved
    seeded = [result(folder, f"ep2-{name}")["random"][0] for name in ("tp2", "pp2_ep2", "one")]
    assert seeded[0] not in saved and seeded[0] == seeded[1] == seeded[2]
