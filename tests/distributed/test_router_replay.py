"""Replayed experts are those of the right token, layer and micro-batch in every layout, and the router still learns.

As in test_gradients.py, against plain torch in float64; here the reference is told which experts each token takes. The
given experts are drawn at random, so that a record of another token, layer or micro-batch gives another gradient.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.distributed.cases as cases
from megatron_rl.model.architectures import read_config
from tests.distributed.conftest import run_worker
from tests.distributed.networks import random_experts
from tests.distributed.reference_step import Reference, fill_logprobs, reference_step
from tests.distributed.test_gradients import too_different
from tests.reference_bailing import bailing_forward

pytestmark = pytest.mark.slow
LAYOUTS = ("tp2", "ep2", "pp2", "pp2_vpp2", "cp2")
in_layouts = pytest.mark.parametrize("layout", LAYOUTS)
with_recompute = pytest.mark.parametrize("recompute", ["none", "selective", "full"])


@dataclass
class Replays:
    """What the reference and each layout make of given experts and of experts recorded under earlier weights."""

    given: Reference
    recorded: Reference
    experts: list[np.ndarray]
    differing: float
    results: dict[str, dict]

    def __getitem__(self, layout: str) -> dict:
        return self.results[layout]


@pytest.fixture(scope="module")
def replays(tmp_path_factory) -> Replays:
    folder = tmp_path_factory.mktemp("replay")
    checkpoint = cases.write_models(folder)[True]
    config = json.loads((checkpoint / "config.json").read_text())
    start = load_file(checkpoint / "model.safetensors")
    later = move(start)
    (folder / "later").mkdir()
    (folder / "later" / "config.json").write_text((checkpoint / "config.json").read_text())
    save_file(later, folder / "later" / "model.safetensors")

    step = cases.draw_sequences()
    own = routes(step, start, config)
    recorded = dataclasses.replace(step, old_logprobs=[], ref_logprobs=[], routed_experts=own)
    fill_logprobs(recorded, to_float64(start), config)
    torch.save(dataclasses.replace(recorded, routed_experts=None), folder / "step.pt")
    given = dataclasses.replace(step, old_logprobs=[], ref_logprobs=[],
                                routed_experts=random_experts(step, read_config(checkpoint)))
    fill_logprobs(given, to_float64(start), config)
    torch.save(given, folder / "given.pt")

    run_worker(("tests.distributed.replay_worker",), folder, 2, list(LAYOUTS))
    results = {layout: torch.load(folder / f"{layout}.pt") for layout in LAYOUTS}
    differing = share_differing(own, routes(step, later, config))
    return Replays(reference_step(given, start, config), reference_step(recorded, later, config), own, differing,
                   results)


def to_float64(weights):
    return {name: tensor.double() for name, tensor in weights.items()}


def move(weights, seed: int = 8):
    """`weights` after an update: each entry moved by some percent of its tensor's deviation."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)
            for name, tensor in weights.items()}


def routes(step: cases.Step, weights, config) -> list[np.ndarray]:
    """int64 [L-1, M, top-k] of each sequence: the experts that these weights choose."""
    with torch.no_grad():
        return [torch.stack(bailing_forward(weights, config, tokens[:-1].tolist(), dtype=torch.float64)[1], 1).numpy()
                for tokens in step.token_ids]


def share_differing(chosen, others) -> float:
    """How many of the chosen experts are not among the others, of all."""
    missed = [(a[..., :, None] != b[..., None, :]).all(-1) for a, b in zip(chosen, others, strict=True)]
    return float(np.concatenate(missed).mean())


@with_recompute
@in_layouts
def test_gradient_with_given_experts_is_the_reference_told_the_same_experts(replays, layout, recompute):
    assert len(replays[layout]["given"][recompute]) >= 2
    for count, gradients in replays[layout]["given"][recompute].items():
        assert too_different(gradients, replays.given.gradients) == {}, f"{count} micro-batches per rank"


@in_layouts
def test_log_probabilities_of_chosen_tokens_are_of_the_given_experts_too(replays, layout):
    """They are the labels, whose log-probabilities another pass gives."""
    assert replays[layout]["chosen_differ"] is False


@in_layouts
def test_gradients_reach_the_router(replays, layout):
    assert len(replays[layout]["given"]["none"]) >= 2
    for gradients in replays[layout]["given"]["none"].values():
        norms = [float(gradient.norm()) for name, gradient in gradients.items() if name.endswith("mlp.gate.weight")]
        assert len(norms) == 3 and min(norms) > 1e-3


@in_layouts
def test_recorded_experts_are_those_that_the_routers_took(replays, layout):
    assert replays[layout]["recorded"]
    for result in replays[layout]["recorded"].values():
        assert share_differing([part.numpy() for part in result["experts"]], replays.experts) == 0


@with_recompute
@in_layouts
def test_recorded_experts_are_replayed_after_the_weights_have_changed(replays, layout, recompute):
    assert replays.differing > 0.02, "otherwise the routers would choose the same by themselves"
    assert too_different(replays[layout]["recorded"][recompute]["gradients"], replays.recorded.gradients) == {}


@in_layouts
def test_share_of_choices_that_the_router_would_not_make_does_not_depend_on_layout(replays, layout):
    differing, choices = replays[layout]["report"]["router/replay_differing"]
    expected, _ = replays["ep2"]["report"]["router/replay_differing"]
    assert differing == expected > 0
    assert choices == sum(experts.size for experts in replays.experts)


@in_layouts
def test_a_record_that_is_skipped_or_taken_twice_is_an_error(replays, layout):
    assert replays[layout]["refused"] == {"none": False, "skipped": True, "stale": True}
