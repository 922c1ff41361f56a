"""Every member of the family against numbers worked by hand: tests/golden/c3po_family.json shows the arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from c3po import (
    C3POLossConfig,
    StepTotals,
    geometric_mean_mask,
    icepop_weights,
    kpop_weights,
    policy_loss,
    tis_weights,
    token_veto_mask,
)
from tests.c3po.steps import F64

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "c3po_family.json").read_text())
STEP = GOLDEN["step"]
MASK = torch.tensor(STEP["mask"], dtype=torch.bool)
IDS, SENTENCES = torch.tensor(STEP["response"]), torch.tensor(STEP["sentence"])
CORRECTIONS = GOLDEN["corrections"]
TOKEN_WEIGHTS = {"tis": tis_weights, "icepop": icepop_weights}
SEQUENCE_MASKS = {"geometric_mean": geometric_mean_mask, "token_veto": token_veto_mask}


def worked(arithmetic: str) -> float:
    return float(eval(arithmetic, {"__builtins__": {}, "ln": math.log, "min": min}))


def worked_tensor(strings: list[str]) -> torch.Tensor:
    return torch.tensor([worked(text) for text in strings], dtype=F64)


def run(surrogate: str, normalisation: str):
    new = torch.tensor(STEP["new_logprob"], dtype=F64, requires_grad=True)
    old = new.detach() - worked_tensor(STEP["new_over_old"]).log()
    totals = StepTotals(*(STEP[key] for key in ("phi", "selected_tokens", "num_responses", "max_response_tokens")))
    loss, sums = policy_loss(
        new, old, torch.tensor(STEP["advantage"], dtype=F64), MASK, sequence_ids=IDS, sentence_ids=SENTENCES,
        denominator=totals.denominator(normalisation, torch.tensor(STEP["response_lengths"])),
        config=C3POLossConfig(**GOLDEN["surrogates"][surrogate]["config"], kl_coef=0.0, entropy_coef=0.0))
    loss.backward()
    return loss.item(), sums, new.grad


@pytest.mark.parametrize("normalisation", GOLDEN["normalisations"])
@pytest.mark.parametrize("surrogate", GOLDEN["surrogates"])
def test_loss_and_gradient(surrogate, normalisation):
    loss, sums, gradient = run(surrogate, normalisation)
    member = GOLDEN["surrogates"][surrogate]
    denominator = worked_tensor(GOLDEN["normalisations"][normalisation]["denominator"])
    objective = worked_tensor(member["objective"])
    assert loss == pytest.approx(worked(GOLDEN["losses"][surrogate][normalisation]))
    assert loss == pytest.approx(-(objective / denominator).sum().item()), "the file contradicts itself"
    torch.testing.assert_close(gradient, -worked_tensor(member["slope"]) / denominator)
    assert sums["policy_loss"].sum.item() == pytest.approx(-objective.sum().item())
    for side in ("low", "high"):
        assert sums[f"clip_{side}_fraction"].sum.item() == member[f"clipped_{side}"]


@pytest.mark.parametrize("name", CORRECTIONS["weights"])
def test_correction(name):
    golden = CORRECTIONS["weights"][name]
    rollout = torch.full((8,), -10.0, dtype=F64)
    old = rollout + worked_tensor(CORRECTIONS["old_over_rollout"]).log()
    if name in TOKEN_WEIGHTS:
        weights, sums = TOKEN_WEIGHTS[name](old, rollout, MASK, **golden["options"])
    else:
        weights, sums = SEQUENCE_MASKS[name](old, rollout, MASK, IDS, **golden["options"])
    torch.testing.assert_close(weights, worked_tensor(golden["expected"]))
    fractions = {key: (value.sum.item(), value.count.item()) for key, value in sums.items() if "fraction" in key}
    assert fractions and fractions == {key: (CORRECTIONS["fractions_of_7_tokens"][key], 7) for key in fractions}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_kpop(dtype):
    kpop = GOLDEN["kpop"]
    p, q, forward, backward, weight = (worked_tensor([token[key] for token in kpop["tokens"]])
                                       for key in ("p", "q", "forward", "backward", "weight"))
    inputs = p.log().to(dtype), q.log().to(dtype), torch.ones(len(p), dtype=torch.bool)
    weights, sums = kpop_weights(*inputs, max_kl=kpop["max_kl"])
    torch.testing.assert_close(weights, weight.to(dtype), rtol=1e-6, atol=1e-6)
    assert (sums["kpop_fraction"].sum.item(), sums["kpop_fraction"].count.item()) == (4, 6)
    # the two divergences themselves: the larger of them is exactly where a token falls out
    for i, edge in enumerate(torch.maximum(forward, backward).tolist()):
        one = [x[i:i + 1] for x in inputs]
        assert kpop_weights(*one, max_kl=edge * (1 + 1e-4))[0].item() > 0
        assert kpop_weights(*one, max_kl=edge * (1 - 1e-4))[0].item() == 0
