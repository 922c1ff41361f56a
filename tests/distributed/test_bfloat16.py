"""In bfloat16 every layout stays within an error budget of float64 of the very same bfloat16 weights.

The step of test_gradients.py with two differences that keep roundings from being amplified: the experts of each token
are those that the reference chooses, and no ratio lies at an edge of the clip range.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tests.distributed.cases as cases
from megatron_rl.model.hf_folder import write_hf_folder
from tests.distributed.conftest import run_worker
from tests.distributed.reference_step import Reference, experts_of, fill_logprobs, reference_step, token_outputs
from tests.distributed.table import worst
from tests.reference_bailing import bailing_forward

GRADIENT_BUDGET = 6e-2
"""||found - float64|| / ||float64|| of any parameter."""
LOGPROB_MEAN, LOGPROB_MAX = 1.3e-2, 7e-2  # nats
CLIP_MARGIN = 0.06

pytestmark = pytest.mark.slow


def away_from_the_clip_range(step: cases.Step, weights, config) -> None:
    """Moves old log-probabilities whose ratio lies close to 1 - eps_low or 1 + eps_high."""
    edges = (1 - cases.LOSS.clip_eps_low, 1 + cases.LOSS.clip_eps_high)
    for index, (tokens, experts) in enumerate(zip(step.token_ids, experts_of(step), strict=True)):
        with torch.no_grad():
            own = token_outputs(weights, config, tokens, experts)[0].numpy()
        old = step.old_logprobs[index][1:]
        close = np.logical_or.reduce([np.abs(np.exp(own - old) - edge) < CLIP_MARGIN for edge in edges])
        old[close] -= np.float32(3 * CLIP_MARGIN)
        assert all(np.abs(np.exp(own - old) - edge).min() >= CLIP_MARGIN for edge in edges)


def write_step(folder: Path, source: Path) -> Reference:
    """Writes the checkpoint folder/bfloat16, that of `source` rounded, and the step folder/bfloat16.pt."""
    config = json.loads((source / "config.json").read_text())
    start = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    wide = {name: tensor.double() for name, tensor in start.items()}
    write_hf_folder(folder / "bfloat16", {**config, "torch_dtype": "bfloat16"}, start.items(), tokenizer_from=source)
    step = cases.draw_sequences()
    routes = [bailing_forward(wide, config, tokens[:-1].tolist(), dtype=torch.float64)[1] for tokens in step.token_ids]
    step = dataclasses.replace(step, routed_experts=[torch.stack(layers, 1).numpy() for layers in routes])
    fill_logprobs(step, wide, config)
    away_from_the_clip_range(step, wide, config)
    torch.save(step, folder / "bfloat16.pt")
    reference = reference_step(step, start, config)
    with torch.no_grad():
        reference.logprobs = {index: token_outputs(wide, config, tokens, step.routed_experts[index])[0]
                              for index, tokens in enumerate(step.token_ids)}
    return reference


@pytest.fixture(scope="module")
def reference(layouts) -> Reference:
    return write_step(layouts.folder, layouts.folder / "norm_head_True")


@pytest.fixture(scope="module")
def results(layouts, reference) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for world_size in sorted({sizes["world_size"] for sizes in cases.LAYOUTS.values()}):
        names = [name for name, sizes in cases.LAYOUTS.items() if sizes["world_size"] == world_size]
        run_worker(("tests.distributed.worker", "bfloat16"), layouts.folder, world_size, names)
        found |= {name: torch.load(layouts.folder / f"{name}.bfloat16.pt") for name in names}
    return found


@pytest.mark.parametrize("layout", list(cases.LAYOUTS))
def test_gradients_are_within_the_budget(results, reference, layout):
    for kernels, gradients in results[layout]["gradients"].items():
        assert gradients.keys() == reference.gradients.keys()
        error = worst(gradients, reference.gradients, reference.gradients)
        print(f"{layout} {kernels}: {error:.2e}")
        assert error <= GRADIENT_BUDGET, kernels


def logprob_errors(found: dict[int, torch.Tensor], reference: Reference) -> tuple[float, float]:
    """Mean and largest, in nats."""
    assert found.keys() == reference.logprobs.keys()
    gaps = torch.cat([(found[index].double() - expected).abs() for index, expected in reference.logprobs.items()])
    return float(gaps.mean()), float(gaps.max())


@pytest.mark.parametrize("layout", list(cases.LAYOUTS))
def test_logprobs_are_within_the_budget(results, reference, layout):
    mean, largest = logprob_errors(results[layout]["logprobs"], reference)
    print(f"{layout}: mean {mean:.2e}, max {largest:.2e}")
    assert mean <= LOGPROB_MEAN and largest <= LOGPROB_MAX


@pytest.mark.parametrize(("layout", "mutation"), [
    (layout, mutation) for layout in cases.MUTATIONS for mutation in cases.mutations(layout)
    if mutation in cases.BFLOAT16_MUTATIONS])
def test_a_broken_factor_shows_above_the_roundings(results, reference, layout, mutation):
    mutated = results[layout]["mutated"][mutation]
    assert worst(mutated, reference.gradients, reference.gradients) > 2 * GRADIENT_BUDGET
