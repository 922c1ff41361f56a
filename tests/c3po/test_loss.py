"""c3po_loss and grpo_loss: goldens by hand, the gradient of each term, and what goes in and comes out.

test_family.py holds what is true of every member; test_golden.py its numbers.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from c3po import C3POLossConfig, SumCount, c3po_loss, grpo_loss
from tests.c3po.steps import F64, step, tensor

PLAIN = C3POLossConfig(kl_coef=0.0, entropy_coef=0.0)
ALL_TERMS = C3POLossConfig(kl_coef=0.1, entropy_coef=0.2)


def c3po(logprobs, per_token, *, phi=11, config=ALL_TERMS):
    return c3po_loss(logprobs, phi=phi, config=config, **per_token)


def grpo(logprobs, per_token, lengths_T, *, num_responses=4, config=ALL_TERMS):
    return grpo_loss(logprobs, response_lengths=lengths_T, num_responses=num_responses, config=config, **per_token)


# Goldens

def test_golden_clip():
    # r = 2, 2, 1/2, 1/2 and 1 with A = 1, -1, 1, -1, 3; clip to [0.8, 1.3] (clip-higher).
    # min(rA, clip(r)A): min(2, 1.3) = 1.3; min(-2, -1.3) = -2; min(.5, .8) = .5; min(-.5, -.8) = -.8; 3. Sum 2.
    # Cut: the first (A > 0 and r > 1.3) and the fourth (A < 0 and r < 0.8). Phi 8: loss = -2/8.
    ratio = tensor(2.0, 2.0, 0.5, 0.5, 1.0)
    logprobs = ratio.log().requires_grad_()
    advantages = tensor(1.0, -1.0, 1.0, -1.0, 3.0)
    config = C3POLossConfig(clip_eps_high=0.3, kl_coef=0.0, entropy_coef=0.0)
    loss, sums = c3po_loss(logprobs, torch.zeros(5, dtype=F64), advantages, torch.ones(5, dtype=torch.bool),
                           phi=8, config=config)
    assert loss.item() == pytest.approx(-0.25)
    # Gradient: -rA/phi where not cut, 0 where cut.
    loss.backward()
    torch.testing.assert_close(logprobs.grad, tensor(0.0, 2 / 8, -0.5 / 8, 0.0, -3 / 8))
    assert sums["clip_high_fraction"].sum.item() == 1
    assert sums["clip_low_fraction"].sum.item() == 1
    assert sums["policy_loss"].sum.item() == pytest.approx(-2.0)
    assert sums["ratio"].sum.item() == pytest.approx(6.0)
    assert all(sums[key].count.item() == 5 for key in ("clip_high_fraction", "policy_loss", "ratio", "approx_kl"))
    # approx_kl, k3 = r - 1 - ln r: two of 1 - ln 2, two of -1/2 + ln 2, one 0: 1 in all.
    assert sums["approx_kl"].sum.item() == pytest.approx(1.0)  # even in log r; the sign is tested below
    assert (sums["selected_tokens"].sum.item(), sums["selected_tokens"].count.item()) == (5, 1)


@pytest.mark.parametrize(("estimator", "value", "slope"), [
    # ref/new = 2, so log(ref/new) = ln 2. Slopes are d/d logprob; d log(ref/new) / d logprob = -1.
    ("k1", -math.log(2), 1.0),                  # log(new/ref)
    ("k2", math.log(2) ** 2 / 2, -math.log(2)),  # half the square
    ("k3", 1 - math.log(2), -1.0),              # 2 - 1 - ln 2; -(2 - 1)
])
def test_golden_kl(estimator, value, slope):
    logprobs = tensor(-2.0).requires_grad_()
    config = C3POLossConfig(kl_coef=0.5, kl_estimator=estimator, entropy_coef=0.0)
    loss, sums = c3po_loss(logprobs, tensor(-2.0), tensor(0.0), torch.ones(1, dtype=torch.bool), phi=4, config=config,
                           ref_logprobs=tensor(-2.0 + math.log(2)))
    loss.backward()
    assert sums["kl"].sum.item() == pytest.approx(value)
    assert loss.item() == pytest.approx(0.5 * value / 4)  # KL raises the loss
    assert logprobs.grad.item() == pytest.approx(0.5 * slope / 4)


def test_golden_entropy_bonus_lowers_the_loss():
    entropy = tensor(2.0, 3.0).requires_grad_()
    config = C3POLossConfig(kl_coef=0.0, entropy_coef=0.1)
    zeros = torch.zeros(2, dtype=F64)
    loss, sums = c3po_loss(zeros, zeros, zeros, torch.tensor([True, False]), phi=4, config=config, entropy=entropy)
    loss.backward()
    assert loss.item() == pytest.approx(-0.1 * 2 / 4)
    torch.testing.assert_close(entropy.grad, tensor(-0.1 / 4, 0.0))
    assert (sums["entropy"].sum.item(), sums["entropy"].count.item()) == (2, 1)


def test_golden_grpo():
    # On policy: a token adds its A. Response of 1 token with A = 2, response of 4 with A = -1, 2 of them kept:
    # -(1/2) (2/1 + (-1 - 1)/4) = -0.75.
    zeros = torch.zeros(5, dtype=F64)
    mask = torch.tensor([True, True, True, False, False])
    loss, _ = grpo_loss(zeros, zeros, tensor(2.0, -1.0, -1.0, -1.0, -1.0), mask, config=PLAIN, num_responses=2,
                        response_lengths=torch.tensor([1, 4, 4, 4, 4]))
    assert loss.item() == pytest.approx(-0.75)


def test_golden_approx_kl_of_samples_from_old():
    # new/old = 4: k3 = 4 - 1 - ln 4 (old/new would give 1/4 - 1 + ln 4).
    _, sums = c3po_loss(tensor(math.log(4)), tensor(0.0), tensor(1.0), torch.ones(1, dtype=torch.bool), phi=1,
                        config=PLAIN)
    assert sums["approx_kl"].sum.item() == pytest.approx(3 - math.log(4))


# Weights

def test_weights_scale_the_policy_gradient_only():
    logprobs, per_token, _ = step()
    base = {**per_token, "weights": None}

    def gradient(**changed):
        leaf = logprobs.clone().requires_grad_()
        return torch.autograd.grad(c3po(leaf, {**base, **changed})[0], leaf)[0]

    zero, one, double = (gradient(weights=torch.full_like(logprobs, w)) for w in (0.0, 1.0, 2.0))
    torch.testing.assert_close(one, gradient())
    torch.testing.assert_close(double - one, one - zero)
    torch.testing.assert_close(zero, gradient(advantages=torch.zeros_like(logprobs)))  # KL is still there
    assert bool((zero != 0).any())


def test_nothing_but_logprobs_and_entropy_gets_a_gradient():
    logprobs, per_token, _ = step()
    leaves = {name: value.clone().requires_grad_() if value.dtype == F64 else value
              for name, value in per_token.items()}
    c3po(logprobs.requires_grad_(), leaves)[0].backward()
    assert logprobs.grad is not None and leaves["entropy"].grad is not None
    for name in ("old_logprobs", "advantages", "ref_logprobs", "weights"):
        assert leaves[name].grad is None, name


# Masking

def test_an_empty_mask_gives_zero_loss_and_gradient():
    logprobs, per_token, _ = step()
    logprobs.requires_grad_()
    loss, sums = c3po(logprobs, {**per_token, "loss_mask": torch.zeros_like(per_token["loss_mask"])})
    loss.backward()
    assert loss.item() == 0 and not bool(logprobs.grad.any())
    assert sums["ratio"].count.item() == 0 == sums["ratio"].sum.item()


# Layout

@pytest.mark.parametrize("objective", ["c3po", "grpo"])
def test_slices_of_a_step_add_up(objective):
    logprobs, per_token, lengths_T = step()

    def run(rows):
        inputs = {name: value[rows] for name, value in per_token.items()}
        return c3po(logprobs[rows], inputs) if objective == "c3po" else grpo(logprobs[rows], inputs, lengths_T[rows])

    whole_loss, whole_sums = run(slice(None))
    slices = [run(slice(start, stop)) for start, stop in ((0, 4), (4, 5), (5, 16))]  # also in mid-response
    torch.testing.assert_close(sum(loss for loss, _ in slices), whole_loss)
    for key, whole in whole_sums.items():
        added = slices[0][1][key] + slices[1][1][key] + slices[2][1][key]
        torch.testing.assert_close(added.sum, whole.sum)
        expected_count = torch.tensor(3.0, dtype=F64) if key == "selected_tokens" else whole.count
        torch.testing.assert_close(added.count, expected_count)


def test_grpo_weighs_responses_alike_and_c3po_weighs_tokens_alike():
    # Two responses, of 2 and of 8 tokens, same advantage, on policy.
    lengths_T = torch.tensor([2] * 2 + [8] * 8)
    zeros, ones, mask = torch.zeros(10, dtype=F64), torch.ones(10, dtype=F64), torch.ones(10, dtype=torch.bool)
    leaf = zeros.clone().requires_grad_()
    loss, _ = grpo_loss(leaf, zeros, ones, mask, response_lengths=lengths_T, num_responses=2, config=PLAIN)
    loss.backward()
    assert leaf.grad[:2].sum().item() == pytest.approx(leaf.grad[2:].sum().item())
    leaf = zeros.clone().requires_grad_()
    c3po_loss(leaf, zeros, ones, mask, phi=10, config=PLAIN)[0].backward()
    torch.testing.assert_close(leaf.grad, torch.full((10,), -0.1, dtype=F64))


def test_the_divisor_is_phi_not_the_tokens_that_arrived():
    logprobs, per_token, _ = step()
    torch.testing.assert_close(c3po(logprobs, per_token, phi=22)[0] * 2, c3po(logprobs, per_token, phi=11)[0])


# Types, keys, errors

def test_bfloat16_input_is_computed_in_float32():
    logprobs, per_token, _ = step()
    half = {name: value.bfloat16() if value.dtype == F64 else value for name, value in per_token.items()}
    widened = {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in half.items()}
    loss, _ = c3po(logprobs.bfloat16(), half)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, c3po(logprobs.bfloat16().float(), widened)[0], rtol=0, atol=0)


def test_keys_do_not_depend_on_what_was_given_and_sums_are_detached():
    logprobs, per_token, lengths_T = step()
    logprobs.requires_grad_()
    full = c3po(logprobs, per_token)[1]
    bare = {name: per_token[name] for name in ("old_logprobs", "advantages", "loss_mask")}
    least = c3po(logprobs, bare, config=PLAIN)[1]
    assert list(full) == list(least) == list(grpo(logprobs, per_token, lengths_T)[1])
    assert (least["kl"].count.item(), least["entropy"].count.item()) == (0, 0)
    for value in full.values():
        assert isinstance(value, SumCount) and not value.sum.requires_grad and value.sum.dtype == F64


def test_kl_is_measured_even_when_it_is_not_trained():
    logprobs, per_token, _ = step()
    loss, sums = c3po(logprobs, per_token, config=PLAIN)
    assert sums["kl"].sum.item() > 0 and sums["entropy"].sum.item() > 0
    without = {**per_token, "ref_logprobs": None, "entropy": None}
    torch.testing.assert_close(loss, c3po(logprobs, without, config=PLAIN)[0], rtol=0, atol=0)


@pytest.mark.parametrize(("key", "value"), [
    ("clip_eps_low", -0.1), ("clip_eps_low", 1.1), ("clip_eps_high", -0.1), ("clip_eps_high", math.inf),
    ("kl_coef", -1.0), ("kl_coef", math.nan), ("entropy_coef", -1.0), ("kl_estimator", "k4"),
])
def test_bad_config_names_its_key(key, value):
    with pytest.raises(ValueError, match=f"{key}="):
        C3POLossConfig(**{key: value})


def test_zero_is_a_coefficient_and_a_width():
    zeros = {"clip_eps_low": 0.0, "clip_eps_high": 0.0, "kl_coef": 0.0, "entropy_coef": 0.0}
    assert zeros.items() <= dataclasses.asdict(C3POLossConfig(**zeros)).items()


@pytest.mark.parametrize("objective", ["c3po", "grpo"])
@pytest.mark.parametrize(("changed", "message"), [
    ({"ref_logprobs": None}, "kl_coef=0.1 needs ref_logprobs"),
    ({"entropy": None}, "entropy_coef=0.2 needs entropy"),
    ({"loss_mask": torch.ones(16)}, "loss_mask must be bool"),
    ({"advantages": torch.ones(4)}, "advantages has shape"),
    ({"weights": torch.ones(16, 1)}, "weights has shape"),
])
def test_bad_input_is_named(objective, changed, message):
    logprobs, per_token, lengths_T = step()
    with pytest.raises(ValueError, match=message):
        if objective == "c3po":
            c3po(logprobs, {**per_token, **changed})
        else:
            grpo(logprobs, {**per_token, **changed}, lengths_T)


def test_bad_divisors_are_named():
    logprobs, per_token, lengths_T = step()
    with pytest.raises(ValueError, match="phi=0"):
        c3po(logprobs, per_token, phi=0)
    with pytest.raises(ValueError, match="num_responses=0"):
        grpo(logprobs, per_token, lengths_T, num_responses=0)
    with pytest.raises(ValueError, match="response_lengths has shape"):
        grpo(logprobs, per_token, lengths_T[:3])
