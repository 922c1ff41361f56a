"""Every surrogate with every normalisation: the naive formula's gradient, any layout, no leak from masked tokens."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from c3po import (
    C3POLossConfig,
    StepTotals,
    c3po_loss,
    geometric_mean_mask,
    grpo_loss,
    icepop_weights,
    kpop_weights,
    packed_sequence_ids,
    padded_sequence_ids,
    policy_loss,
    tis_weights,
    token_veto_mask,
)
from c3po.sequences import sequence_mean, sequence_min
from c3po.surrogate import sequence_log_ratio
from tests.c3po.steps import F64, assert_sums_equal, pad, sequence_ids, step, tensor, totals

SURROGATES = ("ppo", "gspo", "lpo", "cispo")
NORMALISATIONS = ("c3po", "grpo", "dr_grpo", "token_mean")
LENGTHS = (3, 7, 1, 5)
SEED = 8
"""A step in which every surrogate clips some tokens on either side."""
COEFFICIENTS = {"clip_eps_low": 0.1, "clip_eps_high": 0.15, "kl_coef": 0.1, "entropy_coef": 0.2}


def members(test):
    return pytest.mark.parametrize(("surrogate", "normalisation"), list(product(SURROGATES, NORMALISATIONS)))(test)


def evaluate(surrogate, normalisation, logprobs, inputs, lengths_T, ids):
    """(loss, sums, gradient of logprobs, gradient of entropy)."""
    logprobs, entropy = logprobs.clone().requires_grad_(), inputs["entropy"].clone().requires_grad_()
    loss, sums = policy_loss(
        logprobs, config=C3POLossConfig(surrogate=surrogate, **COEFFICIENTS), sequence_ids=ids,
        denominator=totals(step()[1]["loss_mask"]).denominator(normalisation, lengths_T),
        **{**inputs, "entropy": entropy})
    loss.backward()
    return loss.detach(), sums, logprobs.grad, entropy.grad


def naive_loss(surrogate, normalisation, leaf, inputs):
    """The papers' formulas, response by response; GSPO and LPO with gradient through the whole ratio of the response or
    sentence."""
    kept = [[t for t in range(start, start + n) if inputs["loss_mask"][t]]
            for start, n in zip((0, 3, 10, 11), LENGTHS, strict=True)]
    total = leaf.new_zeros(())
    for length, tokens in zip(LENGTHS, kept, strict=True):
        log_ratios = [leaf[t] - inputs["old_logprobs"][t] for t in tokens]
        for t, log_ratio in zip(tokens, log_ratios, strict=True):
            a, w = inputs["advantages"][t], inputs["weights"][t]
            sentence = [other for s, other in zip(tokens, log_ratios, strict=True)
                        if inputs["sentence_ids"][s] == inputs["sentence_ids"][t]]
            unit = {"gspo": log_ratios, "lpo": sentence}.get(surrogate, [log_ratio])
            ratio = (sum(unit) / len(unit)).exp()
            clipped = ratio.clamp(1 - COEFFICIENTS["clip_eps_low"], 1 + COEFFICIENTS["clip_eps_high"])
            policy = clipped.detach() * a * leaf[t] if surrogate == "cispo" else min(ratio * a, clipped * a)
            q = inputs["ref_logprobs"][t] - leaf[t]
            term = w * policy - 0.1 * (q.exp() - 1 - q) + 0.2 * inputs["entropy"][t]
            total = total - term / {"c3po": 11, "grpo": length * 4, "dr_grpo": 4 * 9,
                                    "token_mean": sum(map(len, kept))}[normalisation]
    return total


@members
def test_equals_the_naive_formula_and_its_gradient(surrogate, normalisation):
    logprobs, inputs, lengths_T = step(SEED)
    if surrogate == "gspo":  # a weight per token has no meaning in the sequence form; one per response does
        inputs["weights"] = tensor(0.5, 2.0, 1.0, 1.5).repeat_interleave(torch.tensor(LENGTHS))
    if surrogate == "lpo":
        inputs["weights"] = tensor(0.5, 2.0, 1.0, 1.5, 0.2, 0.7, 1.2)[inputs["sentence_ids"]]
    leaf = logprobs.clone().requires_grad_()
    expected = naive_loss(surrogate, normalisation, leaf, inputs)
    expected.backward()
    ids = sequence_ids()
    loss, sums, gradient, _ = evaluate(surrogate, normalisation, logprobs, inputs, lengths_T, ids)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, leaf.grad)
    low, high = (sums[f"clip_{side}_fraction"].sum.item() for side in ("low", "high"))
    assert low > 0 < high and low + high < 14, "the step must have tokens inside and on both sides of the clip"
    # and in float32 to its precision
    halves = {name: value.float() if value.dtype == F64 else value for name, value in inputs.items()}
    loss32, _, gradient32, _ = evaluate(surrogate, normalisation, logprobs.float(), halves, lengths_T, ids)
    assert loss32.dtype == gradient32.dtype == torch.float32
    torch.testing.assert_close(loss32.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient32.double(), leaf.grad, rtol=1e-5, atol=1e-6)


@members
def test_padded_equals_packed(surrogate, normalisation):
    for seed in range(3):
        logprobs, inputs, lengths_T = step(seed)
        packed = evaluate(surrogate, normalisation, logprobs, inputs, lengths_T, sequence_ids())
        rows = {name: pad(value, fill=math.nan if value.dtype == F64 else 0) for name, value in inputs.items()}
        padded = evaluate(surrogate, normalisation, pad(logprobs, fill=math.nan), rows, pad(lengths_T),
                          padded_sequence_ids(pad(logprobs)))
        torch.testing.assert_close(padded[0], packed[0])
        assert_sums_equal(padded[1], packed[1])
        for gradient, expected in zip(padded[2:], packed[2:], strict=True):
            torch.testing.assert_close(gradient, pad(expected))


@members
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan, 1e6])
def test_masked_values_reach_neither_loss_nor_gradient(surrogate, normalisation, poison):
    clean_logprobs, inputs, lengths_T = step(SEED)
    masked = ~inputs["loss_mask"]
    expected = evaluate(surrogate, normalisation, clean_logprobs, inputs, lengths_T, sequence_ids())
    poisoned = {name: value.masked_fill(masked, poison) if value.dtype == F64 else value
                for name, value in inputs.items()}
    for logprobs in (clean_logprobs, clean_logprobs.masked_fill(masked, poison)):
        actual = evaluate(surrogate, normalisation, logprobs, poisoned, lengths_T.masked_fill(masked, 0),
                          sequence_ids())
        for place in (0, 2, 3):
            torch.testing.assert_close(actual[place], expected[place], rtol=0, atol=0)
        assert_sums_equal(actual[1], expected[1])
    assert not bool(expected[2][masked].any()) and not bool(expected[3][masked].any())


@members
def test_slices_that_hold_whole_sequences_add_up(surrogate, normalisation):
    logprobs, inputs, lengths_T = step(SEED)
    whole = evaluate(surrogate, normalisation, logprobs, inputs, lengths_T, sequence_ids())
    parts = [evaluate(surrogate, normalisation, logprobs[a:b], {k: v[a:b] for k, v in inputs.items()},
                      lengths_T[a:b], sequence_ids()[a:b]) for a, b in ((0, 3), (3, 11), (11, 16))]
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0])
    for place in (2, 3):
        torch.testing.assert_close(torch.cat([part[place] for part in parts]), whole[place])


def plain_lpo(logprobs, inputs, eps):
    """-1/sum |y_i| sum over sentences of n min(u A, clip(u) A), as it is published, in plain Python."""
    new, old, advantages, mask, ids = (x.tolist() for x in (logprobs, *(inputs[name] for name in (
        "old_logprobs", "advantages", "loss_mask", "sentence_ids"))))
    total = 0.0
    for sentence in {sentence for sentence, trained in zip(ids, mask, strict=True) if trained}:
        tokens = [t for t in range(len(ids)) if ids[t] == sentence and mask[t]]
        u, advantage = math.exp(sum(new[t] - old[t] for t in tokens) / len(tokens)), advantages[tokens[0]]
        total += len(tokens) * min(u * advantage, min(max(u, 1 - eps), 1 + eps) * advantage)
    return -total / sum(mask)


def lpo(logprobs, inputs, surrogate="lpo", **ids):
    """(loss, gradient) of the policy term alone over the step's tokens, eps 0.03."""
    leaf = logprobs.clone().requires_grad_()
    config = C3POLossConfig(surrogate=surrogate, clip_eps_low=0.03, clip_eps_high=0.03, kl_coef=0, entropy_coef=0)
    inputs = {name: inputs[name] for name in ("old_logprobs", "advantages", "loss_mask")}
    loss, _ = policy_loss(leaf, denominator=totals(inputs["loss_mask"]).denominator("token_mean", None), config=config,
                          **inputs, **ids)
    loss.backward()
    return loss.detach(), leaf.grad


def test_lpo_is_its_published_sentence_form_and_the_slope_of_it():
    clipped = set()
    for seed in range(20):
        logprobs, inputs, _ = step(seed)
        logprobs = inputs["old_logprobs"] + 0.1 * (logprobs - inputs["old_logprobs"])
        ids = inputs["sentence_ids"]
        loss, gradient = lpo(logprobs, inputs, sentence_ids=ids)
        assert loss.item() == pytest.approx(plain_lpo(logprobs, inputs, 0.03), abs=1e-12)
        for t in range(len(logprobs)):
            h = torch.zeros_like(logprobs)
            h[t] = 1e-6
            slope = (plain_lpo(logprobs + h, inputs, 0.03) - plain_lpo(logprobs - h, inputs, 0.03)) / 2e-6
            assert gradient[t].item() == pytest.approx(slope, abs=1e-8)
        clipped |= {bool(gradient[t]) for t in range(len(logprobs)) if inputs["loss_mask"][t]}
    assert clipped == {True, False}, "some sentences must be clipped, and some not"


def test_one_sentence_per_response_is_gspo_and_one_token_per_sentence_is_ppo():
    for seed in range(5):
        logprobs, inputs, _ = step(seed)
        for ids, surrogate in ((sequence_ids(), "gspo"), (torch.arange(len(logprobs)), "ppo")):
            found = lpo(logprobs, inputs, sentence_ids=ids)
            expected = lpo(logprobs, inputs, surrogate, sequence_ids=sequence_ids())
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert not torch.equal(lpo(logprobs, inputs, sentence_ids=sequence_ids())[1], found[1])


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_c3po_and_grpo_are_two_of_the_normalisations(surrogate):
    logprobs, inputs, lengths_T = step(SEED)
    shared = {"config": C3POLossConfig(surrogate=surrogate, **COEFFICIENTS), "sequence_ids": sequence_ids()}
    for loss, normalisation in ((c3po_loss(logprobs, phi=11, **shared, **inputs), "c3po"),
                                (grpo_loss(logprobs, response_lengths=lengths_T, num_responses=4, **shared, **inputs),
                                 "grpo")):
        torch.testing.assert_close(
            loss[0], evaluate(surrogate, normalisation, logprobs, inputs, lengths_T, sequence_ids())[0])


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_on_policy_every_surrogate_has_one_gradient(normalisation):
    _, inputs, lengths_T = step(SEED)
    first, *others = [evaluate(surrogate, normalisation, inputs["old_logprobs"], inputs, lengths_T, sequence_ids())[2]
                      for surrogate in SURROGATES]
    for gradient in others:
        torch.testing.assert_close(gradient, first)


def test_no_lower_bound():
    # clip_eps_low = 1 leaves a small ratio alone: weight 1/8 instead of 0.8 (CISPO), slope r A instead of 0 (PPO).
    for surrogate in ("cispo", "ppo"):
        logprobs = tensor(-1.0).requires_grad_()
        loss, _ = c3po_loss(logprobs, tensor(-1.0 + math.log(8)), tensor(-1.0), torch.ones(1, dtype=torch.bool), phi=1,
                            config=C3POLossConfig(surrogate=surrogate, clip_eps_low=1.0, kl_coef=0, entropy_coef=0))
        loss.backward()
        assert logprobs.grad.item() == pytest.approx(1 / 8)


@pytest.mark.parametrize(("surrogate", "low", "high"), [("ppo", 1, 1), ("cispo", 2, 2)])
def test_each_bound_counts_with_its_own_width(surrogate, low, high):
    # Bounds 0.9 and 1.3. r = 0.85, 1.2, 1.4 with A = -1, 1, 1: the first is below, the third above. Without advantage
    # 0.85 and 1.4 are so for CISPO, which weighs them otherwise, and have nothing for PPO to cut.
    logprobs = tensor(0.85, 1.2, 1.4, 0.85, 1.4).log()
    config = C3POLossConfig(surrogate=surrogate, clip_eps_low=0.1, clip_eps_high=0.3, kl_coef=0, entropy_coef=0)
    _, sums = c3po_loss(logprobs, torch.zeros(5, dtype=F64), tensor(-1.0, 1.0, 1.0, 0.0, 0.0),
                        torch.ones(5, dtype=torch.bool), phi=1, config=config)
    assert (sums["clip_low_fraction"].sum.item(), sums["clip_high_fraction"].sum.item()) == (low, high)


def test_mismatch_weights_scale_the_policy_gradient_of_every_surrogate_and_nothing_else():
    """C3PO, the correction and the surrogate are separate switches: each product of them is the product."""
    logprobs, inputs, lengths_T = step(SEED)
    rollout = inputs["old_logprobs"] + 0.7 * torch.randn(16, generator=torch.Generator().manual_seed(5), dtype=F64)
    given, ids = (inputs["old_logprobs"], rollout, inputs["loss_mask"]), sequence_ids()
    token_weights = {
        "none": torch.ones(16, dtype=F64), "tis": tis_weights(*given, cap=1.5)[0],
        "icepop": icepop_weights(*given, low=0.7, high=1.5)[0], "kpop": kpop_weights(*given, max_kl=0.1)[0]}
    sequence_weights = [torch.ones(16, dtype=F64), geometric_mean_mask(*given, ids, low=0.7, high=1.1)[0],
                        token_veto_mask(*given, ids, min_ratio=0.4)[0]]
    for surrogate, normalisation in product(SURROGATES, NORMALISATIONS):
        def gradient(weights, surrogate=surrogate, normalisation=normalisation):
            return evaluate(surrogate, normalisation, logprobs, {**inputs, "weights": weights}, lengths_T, ids)[2]

        nothing = gradient(torch.zeros(16, dtype=F64))  # KL alone
        policy = gradient(torch.ones(16, dtype=F64)) - nothing
        for (name, w), keep in product(token_weights.items(), sequence_weights):
            torch.testing.assert_close(gradient(w * keep), nothing + w * keep * policy, msg=f"{surrogate} {name}")
    for name, w in [*token_weights.items()][1:]:
        assert 0 < int((w == token_weights["none"]).sum()) + int((w == 0).sum()) < 16, name
    for keep in sequence_weights[1:]:
        assert 0 < int(keep.sum()) < int(inputs["loss_mask"].sum())


# Sequences

def test_sequence_ids():
    assert packed_sequence_ids(torch.tensor([0, 3, 3, 5], dtype=torch.int32)).tolist() == [0, 0, 0, 2, 2]
    assert packed_sequence_ids(torch.tensor([0, 3, 5]), 5).tolist() == [0, 0, 0, 1, 1]
    assert packed_sequence_ids(torch.tensor([0])).tolist() == []
    assert padded_sequence_ids(torch.zeros(2, 3)).tolist() == [[0, 0, 0], [1, 1, 1]]


def test_sequence_reductions():
    # Sequences 0: 1, 3, (7); 2: (5); 3: -4; in any order, since only the number says where a token belongs.
    values, ids = tensor(1, -4, 7, 3, 5), torch.tensor([0, 3, 0, 0, 2])
    mask = torch.tensor([True, True, False, True, False])
    assert sequence_mean(values, mask, ids).tolist() == [2, -4, 2, 2, 0]
    assert sequence_min(values, mask, ids).tolist() == [1, -4, 1, 1, math.inf]
    nowhere = torch.zeros(0, dtype=torch.int64)
    assert sequence_mean(torch.zeros(0), torch.zeros(0, dtype=torch.bool), nowhere).shape == (0,)


def test_a_sequence_ratio_is_given_to_selected_tokens_only():
    # Elsewhere it would meet an advantage of 0, and an overflowing ratio times 0 is NaN.
    mask, ids = torch.tensor([True, True, False]), torch.zeros(3, dtype=torch.int64)
    assert sequence_log_ratio(tensor(1000, 500, 0), mask, ids).tolist() == [750, 750, 0]


def test_the_mean_of_many_tokens_keeps_the_digits_that_gspo_clips_at():
    # 100,000 tokens of 3e-4 after one of 1000; adding one after the other in float32 would lose some of each.
    values = torch.full((100_001,), 3e-4)
    values[0] = 1000.0
    mean = sequence_mean(values, torch.ones_like(values, dtype=torch.bool), torch.zeros_like(values, dtype=torch.int64))
    assert mean[0].item() == pytest.approx(1030 / 100_001, rel=1e-7)


def test_a_response_without_a_selected_token_gives_nothing():
    logprobs, inputs, lengths_T = step(SEED)
    inputs["loss_mask"] = inputs["loss_mask"] & (sequence_ids() != 1)
    loss, sums, gradient, _ = evaluate("gspo", "c3po", logprobs, inputs, lengths_T, sequence_ids())
    assert math.isfinite(loss) and not bool(gradient[3:10].any()) and sums["ratio"].count.item() == 9


# Totals and errors

def test_a_step_without_tokens_divides_by_one():
    empty = StepTotals(phi=8, selected_tokens=0, num_responses=0, max_response_tokens=5)
    lengths_T = torch.tensor([2, 2])
    assert empty.denominator("token_mean", lengths_T) == 1
    assert empty.denominator("dr_grpo", lengths_T) == 5
    assert empty.denominator("grpo", lengths_T).tolist() == [2, 2]


@pytest.mark.parametrize(("call", "message"), [
    (lambda x, m, i: StepTotals(1, 1, 1, 1).denominator("mean", x), "normalisation='mean'"),
    (lambda x, m, i: C3POLossConfig(surrogate="trpo"), "surrogate='trpo'"),
    (lambda x, m, i: policy_loss(x, x, x, m, denominator=0, config=C3POLossConfig(kl_coef=0, entropy_coef=0)),
     "denominator=0"),
    (lambda x, m, i: policy_loss(x, x, x, m, denominator=x[:1], config=C3POLossConfig(kl_coef=0, entropy_coef=0)),
     "denominator has shape"),
    (lambda x, m, i: c3po_loss(x, x, x, m, phi=1, config=C3POLossConfig("gspo", kl_coef=0, entropy_coef=0)),
     "gspo needs sequence_ids"),
    (lambda x, m, i: c3po_loss(x, x, x, m, phi=1, config=C3POLossConfig("lpo", kl_coef=0, entropy_coef=0)),
     "lpo needs sentence_ids"),
    (lambda x, m, i: c3po_loss(x, x, x, m, phi=1, sequence_ids=i[:2],
                               config=C3POLossConfig("gspo", kl_coef=0, entropy_coef=0)),
     "sequence_ids must be int64"),
    (lambda x, m, i: kpop_weights(x, x, m, max_kl=0.0), "max_kl=0.0"),
    (lambda x, m, i: geometric_mean_mask(x, x, m, i, low=2.0, high=1.0), "low=2.0"),
    (lambda x, m, i: geometric_mean_mask(x, x, m, i, low=0.0, high=1.0), "low=0.0"),
    (lambda x, m, i: token_veto_mask(x, x, m, i, min_ratio=1.0), "min_ratio=1.0"),
    (lambda x, m, i: token_veto_mask(x, x, m, i, min_ratio=0.0), "min_ratio=0.0"),
    (lambda x, m, i: token_veto_mask(x, x, m, i.float(), min_ratio=0.1), "sequence_ids must be int64"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3), torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64))
