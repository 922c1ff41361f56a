"""Distilled advantages and the top-k KL by hand and in plain Python; their gradients are those of the KL."""

from __future__ import annotations

import math

import pytest
import torch

from c3po import C3POLossConfig, distilled_advantages, policy_loss, topk_distillation_loss
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


def test_top_k_by_hand():
    # k = 2 of 4 tokens. Student 0.5 0.3 | 0.2, teacher 0.25 0.5 | 0.25; the second position has no teacher.
    student = torch.tensor([[0.5, 0.3], [0.1, 0.1], [0.1, 0.1]], dtype=F64).log()
    teacher = torch.tensor([[0.25, 0.5], [math.nan, math.nan], [0.1, 0.1]], dtype=F64).log()
    mask = torch.tensor([True, True, False])
    reverse = 0.5 * math.log(2) + 0.3 * math.log(0.6) + 0.2 * math.log(0.8)
    forward = 0.25 * math.log(0.5) + 0.5 * math.log(5 / 3) + 0.25 * math.log(1.25)
    for divergence, expected in (("reverse", reverse), ("forward", forward)):
        loss, sums = topk_distillation_loss(student, teacher, mask, coef=0.7, denominator=11, divergence=divergence)
        assert loss.item() == pytest.approx(0.7 * expected / 11, abs=1e-12)
        assert (sums["distill_kl"].sum.item(), sums["distill_kl"].count) == (pytest.approx(expected, abs=1e-12), 1)
        assert sums["distill_mass"].sum.item() == pytest.approx(0.8, abs=1e-12)
        assert sums["distill_teacher_mass"].sum.item() == pytest.approx(0.75, abs=1e-12)


def top_k_step(seed: int, tokens: int = 16, vocabulary: int = 9, k: int = 4):
    """(logits [T, V] of the student, log-probabilities [T, V] of the teacher, ids [T, k], mask [T], divisors [T])."""
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (torch.randn(tokens, vocabulary, generator=generator, dtype=F64) for _ in range(2))
    ids = torch.stack([torch.randperm(vocabulary, generator=generator)[:k] for _ in range(tokens)])
    return (logits, teacher.log_softmax(-1), ids, torch.rand(tokens, generator=generator) < 0.7,
            torch.randint(2, 30, (tokens,), generator=generator).double())


def plain_kl(logits, teacher, ids, mask, divisors, divergence):
    total = 0.0
    columns = (logits, teacher, ids, mask, divisors)
    for row, others, chosen, trained, divisor in zip(*(column.tolist() for column in columns), strict=True):
        p, q = [math.exp(row[i]) / sum(map(math.exp, row)) for i in chosen], [math.exp(others[i]) for i in chosen]
        first, second = ([*p, 1 - sum(p)], [*q, 1 - sum(q)])[::1 if divergence == "reverse" else -1]
        total += trained * sum(x * math.log(x / y) for x, y in zip(first, second, strict=True)) / divisor
    return total


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_top_k_equals_plain_python_and_its_slope_a_finite_difference_and_its_slices_add_up(divergence):
    for seed in range(3):
        logits, *rest = top_k_step(seed)
        leaf = logits.clone().requires_grad_()

        def loss_of(leaf, part=slice(None), given=rest):
            teacher, ids, mask, divisors = (each[part] for each in given)
            return topk_distillation_loss(leaf[part].log_softmax(-1).gather(1, ids), teacher.gather(1, ids), mask,
                                          coef=0.7, denominator=divisors, divergence=divergence)[0]

        loss = loss_of(leaf)
        loss.backward()
        assert loss.item() == pytest.approx(0.7 * plain_kl(logits, *rest, divergence), abs=1e-12)
        for t, v in [(0, 0), (3, 4), (7, 8), (12, 2), (15, 5)]:
            h = torch.zeros_like(logits)
            h[t, v] = 1e-6
            slope = (plain_kl(logits + h, *rest, divergence) - plain_kl(logits - h, *rest, divergence)) / 2e-6
            assert leaf.grad[t, v].item() == pytest.approx(0.7 * slope, abs=1e-8)
        parts = [loss_of(logits, part) for part in (slice(0, 4), slice(4, 5), slice(5, 16))]
        torch.testing.assert_close(sum(parts), loss.detach(), rtol=0, atol=1e-12)
        teacher, ids, mask, _ = rest
        one = [topk_distillation_loss(logits.log_softmax(-1).gather(1, ids), teacher.gather(1, ids), mask, coef=1.0,
                                      denominator=phi, divergence=divergence)[0] for phi in (11, 22)]
        torch.testing.assert_close(one[0], 2 * one[1])


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_k_as_large_as_the_vocabulary_is_the_whole_kl_and_fewer_tokens_give_less(divergence):
    logits, teacher, _, _, _ = top_k_step(0)
    student, mask = logits.log_softmax(-1), torch.ones(16, dtype=torch.bool)
    order = teacher.argsort(-1, descending=True)
    found = [topk_distillation_loss(student.gather(1, order[:, :k]), teacher.gather(1, order[:, :k]), mask, coef=1.0,
                                    denominator=1, divergence=divergence)[0].item() for k in range(1, 10)]
    first, second = (student, teacher) if divergence == "reverse" else (teacher, student)
    assert found[-1] == pytest.approx((first.exp() * (first - second)).sum().item(), abs=1e-12)
    assert found == sorted(found) and found[0] > 0


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_self_teacher_of_k_tokens_gives_zero_exactly(divergence, dtype):
    """Even if the k tokens have all of the probability, or none that float32 can tell."""
    for scale in (0.1, 3.0, 60.0):
        logits = (scale * top_k_step(1)[0]).to(dtype).requires_grad_()
        chosen = logits.log_softmax(-1).topk(4).values
        loss, sums = topk_distillation_loss(chosen, chosen.detach(), torch.ones(16, dtype=torch.bool), coef=3.0,
                                            denominator=11, divergence=divergence)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert (loss.item(), sums["distill_kl"].sum.item()) == (0.0, 0.0)
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_masked_values_reach_nothing_of_the_k_tokens(poison):
    logits, teacher, ids, mask, divisors = top_k_step(2)
    grads = []
    for value in (0.0, poison):
        leaf = logits.log_softmax(-1).gather(1, ids).masked_fill(~mask[:, None], value).requires_grad_()
        loss, _ = topk_distillation_loss(leaf, teacher.gather(1, ids).masked_fill(~mask[:, None], value), mask,
                                         coef=1.0, denominator=divisors.masked_fill(~mask, value))
        loss.backward()
        grads.append((loss.item(), leaf.grad))
    assert grads[0][0] == grads[1][0] and torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize(("changed", "said"), [
    ({"coef": math.nan}, "coef=nan"), ({"loss_mask": torch.ones(3)}, "must be bool"), ({"denominator": 0}, "positive"),
    ({"divergence": "both"}, "must be reverse or forward"), ({"teacher_logprobs": torch.ones(3, 3)}, "one shape"),
    ({"logprobs": torch.ones(3), "teacher_logprobs": torch.ones(3)}, "one shape"),
    ({"denominator": torch.ones(3, 2)}, "denominator has shape")])
def test_bad_input_of_the_top_k_is_named(changed, said):
    given = {"logprobs": -torch.ones(3, 2), "teacher_logprobs": -torch.ones(3, 2),
             "loss_mask": torch.ones(3, dtype=torch.bool), "coef": 1.0, "denominator": 1.0}
    with pytest.raises(ValueError, match=said):
        topk_distillation_loss(**{**given, **changed})
