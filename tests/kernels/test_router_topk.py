"""The Triton router_topk against the reference: choices, sums, gradients, replay, and faults that must show."""

from __future__ import annotations

import math

import pytest
import torch

from rl_kernels.router_topk import router_topk, router_topk_reference
from tests.kernels.conftest import DEVICE

BF16_MARGIN = 1.5
"""The kernel's error against float32 may be this many times the error of the router in torch's bfloat16."""
SHAPES = [(1, 3, 2, 1), (13, 7, 5, 2), (37, 36, 20, 6)]


def problem(tokens, hidden, experts, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(tokens, hidden, generator=generator).to(DEVICE, dtype)
    weight_EH = torch.randn(experts, hidden, generator=generator).to(DEVICE, dtype)
    real_T = (torch.arange(tokens) % 4 != 2).to(DEVICE)
    return hidden_TH, weight_EH, real_T


def results(function, hidden_TH, weight_EH, k, **options):
    """(outputs, [grad hidden, grad weight]) of a loss in which every differentiable output counts."""
    hidden_TH, weight_EH = hidden_TH.clone().requires_grad_(), weight_EH.clone().requires_grad_()
    routed = function(hidden_TH, weight_EH, k, **options)
    mix_TK = torch.linspace(-1.0, 2.0, routed.weights_TK.numel(), device=DEVICE).view_as(routed.weights_TK)
    mix_E = torch.linspace(1.0, -0.5, len(weight_EH), device=DEVICE)
    ((routed.weights_TK * mix_TK).sum() + (routed.prob_sums_E * mix_E).sum() + 0.3 * routed.z_sum).backward()
    return [value.detach() for value in routed], [hidden_TH.grad, weight_EH.grad]


def assert_equal_results(actual, expected, tolerance=2e-5):
    for a, e in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def test_golden_three_experts():
    # Logits (ln 4, ln 2, 0): p = (4, 2, 1) / 7. Top 2: weights 4/6 and 2/6, or 4/7 and 2/7. lse = ln 7.
    hidden_TH = torch.tensor([[math.log(4.0), math.log(2.0), 0.0]], device=DEVICE)
    weight_EH = torch.eye(3, device=DEVICE)
    routed = router_topk(hidden_TH, weight_EH, 2)
    torch.testing.assert_close(routed.weights_TK.cpu(), torch.tensor([[4 / 6, 2 / 6]]))
    assert routed.indices_TK.tolist() == [[0, 1]] and routed.counts_E.tolist() == [1, 1, 0]
    torch.testing.assert_close(routed.prob_sums_E.cpu(), torch.tensor([4.0, 2.0, 1.0]) / 7)
    assert routed.z_sum.item() == pytest.approx(math.log(7.0) ** 2, rel=1e-5)
    plain = router_topk(hidden_TH, weight_EH, 2, normalize=False)
    torch.testing.assert_close(plain.weights_TK.cpu(), torch.tensor([[4 / 7, 2 / 7]]))


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "hidden", "experts", "k"), SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_outputs_and_both_gradients_equal_the_reference(tokens, hidden, experts, k, normalize):
    hidden_TH, weight_EH, real_T = problem(tokens, hidden, experts)
    for options in ({}, {"real_T": real_T}):
        assert_equal_results(
            results(router_topk, hidden_TH, weight_EH, k, normalize=normalize, impl="triton", **options),
            results(router_topk_reference, hidden_TH, weight_EH, k, normalize=normalize, **options))


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [True, False])
def test_replayed_indices_replace_the_choice_and_keep_the_gradient(normalize):
    hidden_TH, weight_EH, real_T = problem(19, 8, 6)
    worst_TK = (hidden_TH @ weight_EH.T).topk(2, largest=False).indices
    options = {"indices_TK": worst_TK, "real_T": real_T, "normalize": normalize}
    actual = results(router_topk, hidden_TH, weight_EH, 2, impl="triton", **options)
    assert torch.equal(actual[0][1], worst_TK)
    assert_equal_results(actual, results(router_topk_reference, hidden_TH, weight_EH, 2, **options))
    assert float(actual[1][0].norm()) > 0.01


@pytest.mark.slow
def test_replaying_the_own_choice_changes_nothing():
    hidden_TH, weight_EH, _ = problem(19, 8, 6)
    own = results(router_topk, hidden_TH, weight_EH, 2, impl="triton")
    again = results(router_topk, hidden_TH, weight_EH, 2, impl="triton", indices_TK=own[0][1])
    assert_equal_results(again, own, tolerance=0)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [200.0, -200.0])
def test_large_logits_stay_exact(shift):
    hidden_TH, weight_EH, real_T = problem(19, 8, 6)
    hidden_TH[:, 0], weight_EH[:, 0] = 1.0, shift
    options = {"real_T": real_T, "k": 2}
    actual, expected = (results(function, hidden_TH, weight_EH, **options, **impl) for function, impl in (
        (router_topk, {"impl": "triton"}), (router_topk_reference, {})))
    assert torch.equal(actual[0][1], expected[0][1])
    for ours, truth in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-3)  # of float32 logits of 200, at most 1.5e-5 each


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_row_of_nan_chooses_different_experts_that_exist_and_says_nan(impl):
    hidden_TH, weight_EH, _ = problem(19, 8, 5)
    clean = router_topk(hidden_TH, weight_EH, 3, impl=impl)
    hidden_TH[4] = torch.nan
    routed = router_topk(hidden_TH, weight_EH, 3, impl=impl)
    choice = set(routed.indices_TK[4].tolist())
    assert len(choice) == 3 and choice <= set(range(5)) and bool(routed.weights_TK[4].isnan().all())
    others = torch.arange(19, device=DEVICE) != 4
    assert torch.equal(routed.indices_TK[others], clean.indices_TK[others])
    assert torch.equal(routed.weights_TK[others], clean.weights_TK[others])


@pytest.mark.slow
def test_no_tokens_give_zero_sums():
    hidden_TH, weight_EH, _ = problem(0, 8, 6)
    outputs, gradients = results(router_topk, hidden_TH, weight_EH, 2, impl="triton")
    assert outputs[0].shape == (0, 2) and all(float(value.sum()) == 0 for value in (*outputs[2:], *gradients))


@pytest.mark.slow
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_error_is_within_the_budget(weight_dtype):
    """The choice is replayed, so that rounding cannot change it; torch's own router multiplies in bfloat16."""
    hidden_TH, weight_EH, real_T = problem(48, 32, 12, torch.bfloat16)
    indices_TK = router_topk_reference(hidden_TH, weight_EH, 3).indices_TK
    options = {"indices_TK": indices_TK, "real_T": real_T}
    exact = results(router_topk_reference, hidden_TH.float(), weight_EH.float(), 3, **options)

    def torch_bfloat16(hidden_TH, weight_EH, k, **options):
        logits_TE = hidden_TH @ weight_EH.T
        return router_topk_reference(logits_TE, torch.eye(len(weight_EH), device=DEVICE), k, **options)

    ours = results(router_topk, hidden_TH, weight_EH.to(weight_dtype), 3, impl="triton", **options)
    theirs = results(torch_bfloat16, hidden_TH, weight_EH, 3, **options)
    for place in (0, 3, 4, 5):
        torch.testing.assert_close(ours[0][place], exact[0][place], rtol=1e-5, atol=1e-5)  # fp32 logits: no rounding
    for kernel, torch_own, truth in zip(ours[1], theirs[1], exact[1], strict=True):
        errors = [float((gradient.float() - truth).norm()) for gradient in (kernel, torch_own)]
        assert errors[0] <= BF16_MARGIN * errors[1]


FAULTS = {
    "chosen twice": ("left = tl.where(is_choice, 4 * LOWEST, left)", "left = left + 0.0"),
    "padding counted": ("tl.where(is_real[:, None], probs, 0.0)", "probs"),
    "z without square": ("lse * lse", "lse"),
    "softmax gradient": ("grad_p - tl.sum(probs * grad_p, 1)[:, None] + slope", "grad_p + slope"),
    "choices' gradient": ("* (g - inner)", "* g"),
    "rows of a split": ("row_mask = rows < end\n", "row_mask = rows < end - 1\n"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_shows(fault, mutated, monkeypatch):
    from rl_kernels.router_topk import triton_impl

    hidden_TH, weight_EH, real_T = problem(37, 36, 20)
    expected = results(router_topk_reference, hidden_TH, weight_EH, 6, real_T=real_T)
    broken = mutated(triton_impl, *FAULTS[fault])
    monkeypatch.setattr(triton_impl, "TritonRouter", broken.TritonRouter)
    with pytest.raises(AssertionError):
        assert_equal_results(results(router_topk, hidden_TH, weight_EH, 6, real_T=real_T, impl="triton"), expected)


@pytest.mark.parametrize(("changed", "message"), [
    ({"hidden_TH": torch.ones(3, 5)}, "same H"),
    ({"k": 7}, "k=7 must lie between 1 and the 6 experts"),
    ({"indices_TK": torch.zeros(3, 1, dtype=torch.int64)}, "indices_TK must be int64"),
    ({"real_T": torch.ones(3)}, "real_T must be bool"),
    ({"impl": "fast"}, "impl='fast'"),
    ({"impl": "triton", "weight_EH": torch.ones(300, 4)}, "at most 256 experts"),
])
def test_bad_input_is_named(changed, message):
    good = {"hidden_TH": torch.ones(3, 4), "weight_EH": torch.ones(6, 4), "k": 2}
    arguments = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
                 for name, value in (good | changed).items()}
    with pytest.raises(ValueError, match=message):
        router_topk(**arguments)
