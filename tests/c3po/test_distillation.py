"""Distilled advantages by hand and in plain Python; their policy gradient is the gradient of the reverse KL."""

from __future__ import annotations

import math

import pytest
import torch

from c3po import C3POLossConfig, distilled_advantages, policy_loss
from tests.c3po.steps import F64, step, tensor

PLAIN = C3POLossConfig(kl_coef=0.0, entropy_coef=0.0)
MASK = torch.tensor([True, True, True, False])


def test_by_hand():
    # ln old - ln teacher: ln 2, -ln 4, nobody, masked; coef 0.5
    old, teacher = tensor(0.5, 0.1, 0.3, 0.2).log(), tensor(0.25, 0.4, math.nan, 0.9).log()
    found, sums = distilled_advantages(tensor(1.0, -1.0, 2.0, 9.0), old, teacher, MASK, coef=0.5)
    expected = tensor(1 - 0.5 * math.log(2), -1 + 0.5 * math.log(4), 2.0, 0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert sums["distill_gap"].sum.item() == pytest.approx(math.log(2) - math.log(4)) and sums["distill_gap"].count == 2
    assert sums["distill_kl"].sum.item() == pytest.approx((0.5 - 1 + math.log(2)) + (4 - 1 - math.log(4)))
    pure, _ = distilled_advantages(tensor(1.0, -1.0, 2.0, 9.0), old, teacher, MASK, coef=0.5, task_reward=False)
    torch.testing.assert_close(pure, tensor(-0.5 * math.log(2), 0.5 * math.log(4), 0.0, 0.0), rtol=0, atol=1e-12)


def distilled_loss(leaf, inputs, teacher, *, phi=11, part=slice(None), **options):
    advantages, _ = distilled_advantages(inputs["advantages"][part], inputs["old_logprobs"][part], teacher[part],
                                         inputs["loss_mask"][part], **options)
    return policy_loss(leaf[part], inputs["old_logprobs"][part], advantages, inputs["loss_mask"][part], denominator=phi,
                       config=PLAIN)[0]


def plain_loss(new, inputs, teacher, coef, phi=11):
    columns = (new, teacher, *(inputs[name] for name in ("old_logprobs", "advantages", "loss_mask")))
    total = 0.0
    for n, d, o, advantage, trained in zip(*(column.tolist() for column in columns), strict=True):
        if trained:
            a, r = advantage - coef * (o - d), math.exp(n - o)
            total += min(r * a, min(max(r, 0.8), 1.2) * a)
    return -total / phi


def test_the_loss_its_slope_its_slices_and_its_divisor():
    """Phi divides the teacher's term as it divides the task's."""
    clipped = 0
    for seed in range(5):
        logprobs, inputs, _ = step(seed)
        teacher = inputs["ref_logprobs"]
        leaf = logprobs.clone().requires_grad_()
        loss = distilled_loss(leaf, inputs, teacher, coef=0.7)
        loss.backward()
        assert loss.item() == pytest.approx(plain_loss(logprobs, inputs, teacher, 0.7), abs=1e-12)
        for t in range(len(logprobs)):
            h = torch.zeros_like(logprobs)
            h[t] = 1e-6
            slope = (plain_loss(logprobs + h, inputs, teacher, 0.7)
                     - plain_loss(logprobs - h, inputs, teacher, 0.7)) / 2e-6
            assert leaf.grad[t].item() == pytest.approx(slope, abs=1e-8)
        clipped += int((leaf.grad == 0).sum())
        parts = [distilled_loss(logprobs, inputs, teacher, part=part, coef=0.7)
                 for part in (slice(0, 4), slice(4, 5), slice(5, 16))]
        torch.testing.assert_close(sum(parts), loss.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(distilled_loss(logprobs, inputs, teacher, coef=0.7, phi=22) * 2, loss.detach())
    assert clipped > 2 * 5, "besides the two masked tokens, some must be clipped"


def test_the_expected_gradient_is_that_of_the_reverse_kl():
    """All tokens of a vocabulary, each weighed by its probability, instead of samples: grad KL(student || teacher)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=F64).requires_grad_()
    teacher = torch.randn(6, generator=generator, dtype=F64).log_softmax(0)
    student = logits.log_softmax(0)
    (expected,) = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits, retain_graph=True)
    advantages, sums = distilled_advantages(torch.zeros(6), student.detach(), teacher, torch.ones(6, dtype=torch.bool),
                                            coef=1.0)
    loss = -(student.detach().exp() * advantages * (student - student.detach()).exp()).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)
    assert sums["distill_kl"].sum > 0


def test_a_self_teacher_changes_nothing_exactly():
    logprobs, inputs, _ = step()
    found, sums = distilled_advantages(inputs["advantages"], logprobs, logprobs, inputs["loss_mask"], coef=3.0)
    assert torch.equal(found, torch.where(inputs["loss_mask"], inputs["advantages"], 0.0))
    assert (sums["distill_gap"].sum, sums["distill_kl"].sum) == (0.0, 0.0)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_masked_values_reach_nothing(poison):
    logprobs, inputs, _ = step()
    masked = ~inputs["loss_mask"]
    clean = distilled_advantages(inputs["advantages"], logprobs, inputs["ref_logprobs"], inputs["loss_mask"], coef=1.0)
    dirty = distilled_advantages(inputs["advantages"].masked_fill(masked, poison), logprobs.masked_fill(masked, poison),
                                 inputs["ref_logprobs"].masked_fill(masked, poison), inputs["loss_mask"], coef=1.0)
    assert torch.equal(clean[0], dirty[0]) and clean[1]["distill_gap"].sum == dirty[1]["distill_gap"].sum


@pytest.mark.parametrize(("changed", "said"), [
    ({"coef": -1.0}, "coef=-1.0"), ({"coef": math.inf}, "coef=inf"), ({"loss_mask": torch.ones(4)}, "must be bool"),
    ({"teacher_logprobs": torch.ones(3)}, "must have one shape")])
def test_bad_input_is_named(changed, said):
    given = {"advantages": torch.ones(4), "old_logprobs": torch.ones(4), "teacher_logprobs": torch.ones(4),
             "loss_mask": MASK, "coef": 1.0}
    with pytest.raises(ValueError, match=said):
        distilled_advantages(**{**given, **changed})
