"""The Triton linear_logprob against the reference: values, gradients, two ranks, and faults that must show."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rl_kernels.linear_logprob import linear_logprob, linear_logprob_reference, op
from tests.kernels.conftest import DEVICE

pytestmark = pytest.mark.slow


def problem(tokens, hidden, vocab, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(tokens, hidden, generator=generator).to(DEVICE, dtype)
    weight_VH = torch.randn(vocab, hidden, generator=generator).to(DEVICE, dtype)
    labels_T = torch.randint(vocab, (tokens,), generator=generator)
    labels_T[::5] = -100
    return hidden_TH, weight_VH, labels_T.to(DEVICE)


def results(function, hidden_TH, weight_VH, labels_T, with_entropy=True, **options):
    """[logprob, entropy, grad hidden, grad weight] of a loss that weighs every token differently."""
    hidden_TH, weight_VH = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    logprobs_T, entropy_T = function(hidden_TH, weight_VH, labels_T, **options)
    mix_T = torch.linspace(-1.0, 2.0, labels_T.numel(), device=DEVICE)
    loss = (mix_T * logprobs_T).sum()
    if with_entropy:
        loss = loss + (mix_T.flip(0) * entropy_T).sum()
    loss.backward()
    return [logprobs_T.detach(), entropy_T.detach(), hidden_TH.grad, weight_VH.grad]


@pytest.fixture(params=["triton", "fused"])
def triton(request):
    """Both implementations with kernels: their own products, and torch's."""
    return partial(linear_logprob, impl=request.param)


def relative_error(actual, expected) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


# One row of one tile; neither side a multiple of a tile; several tiles, k-steps and splits of the vocabulary.
SHAPES = [(1, 3, 2), (13, 7, 31), (35, 20, 70)]


@pytest.mark.parametrize(("tokens", "hidden", "vocab"), SHAPES)
@pytest.mark.parametrize(("temperature", "scaled"), [(1.0, False), (0.6, True)])
def test_values_and_both_gradients_equal_the_reference(triton, tokens, hidden, vocab, temperature, scaled):
    tensors = problem(tokens, hidden, vocab)
    scale_H = torch.linspace(0.2, 1.7, hidden, device=DEVICE) if scaled else None
    options = {"temperature": temperature, "column_scale_H": scale_H}
    for actual, expected in zip(results(triton, *tensors, **options),
                                results(linear_logprob_reference, *tensors, **options), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_a_loss_without_entropy_has_the_same_gradients(triton):
    tensors = problem(19, 9, 40)
    for actual, expected in zip(results(triton, *tensors, with_entropy=False),
                                results(linear_logprob_reference, *tensors, with_entropy=False), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    logprobs_T, entropy_T = triton(*tensors, with_entropy=False)
    assert entropy_T is None
    torch.testing.assert_close(logprobs_T, linear_logprob_reference(*tensors)[0], rtol=2e-5, atol=2e-5)


def test_blocks_of_the_backward_pass_do_not_change_the_result(triton, monkeypatch):
    tensors = problem(35, 20, 70)
    whole = results(triton, *tensors)
    monkeypatch.setattr(op._Head, "block", lambda head, tokens, device: (16, 17))
    for actual, expected in zip(results(triton, *tensors), whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_large_logits_stay_exact(triton, sign):
    """Growing and falling by hundreds from block to block of the vocabulary, and all far from zero."""
    hidden_TH = torch.ones(3, 1, device=DEVICE)
    weight_VH = sign * torch.arange(200.0, 1600.0, 20.0, device=DEVICE)[:, None]
    labels_T = torch.tensor([0, 33, 69], device=DEVICE)
    for direction in (weight_VH, weight_VH.flip(0)):
        *values, grad_hidden, grad_weight = results(triton, hidden_TH, direction, labels_T)
        *exact, exact_hidden, exact_weight = results(linear_logprob_reference, hidden_TH.double(), direction.double(),
                                                     labels_T)
        for actual, expected in zip(values, exact, strict=True):
            torch.testing.assert_close(actual, expected.float(), rtol=1e-6, atol=1e-6)
        # a probability is exp(logit - logsumexp), whose float32 rounding at 1600 is 6e-5; a weight is at most 1600
        torch.testing.assert_close(grad_weight, exact_weight.float(), rtol=0, atol=1e-4)
        torch.testing.assert_close(grad_hidden, exact_hidden.float(), rtol=0, atol=1e-4 * 1600)


def test_ignored_rows_are_zero_even_when_they_hold_nan(triton):
    hidden_TH, weight_VH, labels_T = problem(20, 6, 15)
    clean = results(triton, hidden_TH, weight_VH, labels_T)
    poisoned_TH = torch.where((labels_T < 0)[:, None], torch.nan, hidden_TH)
    for actual, expected in zip(results(triton, poisoned_TH, weight_VH, labels_T), clean, strict=True):
        assert torch.equal(actual, expected)
    assert all(bool((values[labels_T < 0] == 0).all()) for values in clean[:3])


def test_float64_is_refused_and_so_is_a_cpu_without_the_interpreter(triton, monkeypatch):
    hidden_TH, weight_VH, labels_T = problem(3, 4, 5)
    with pytest.raises(ValueError, match="float64"):
        triton(hidden_TH.double(), weight_VH.double(), labels_T)
    monkeypatch.setattr("rl_kernels.triton_impl.INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a CUDA tensor"):
        triton(hidden_TH.cpu(), weight_VH.cpu(), labels_T.cpu())
    with pytest.raises(ValueError, match="impl='fast'"):
        linear_logprob(hidden_TH, weight_VH, labels_T, impl="fast")


FAULTS = {
    "no rescaling of the sum": ("exp_sum = exp_sum * tl.exp(down)", "exp_sum = exp_sum"),
    "no rescaling of the dot": ("(exp_dot + down * exp_sum) * tl.exp(down)", "exp_dot * tl.exp(down)"),
    "columns past the end": ("exp = tl.where(inside, tl.exp(shifted), 0.0)", "exp = tl.exp(shifted)"),
    "temperature": ("logp = logits * inverse_temperature - tl", "logp = logits - tl"),
    "label of the gradient": ("tl.where(is_label, g_logprob, 0.0)", "0.0"),
    "entropy of the gradient": ("slope = g_logprob + g_entropy * (logp +", "slope = g_logprob + g_entropy * (0.0 +"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_shows(triton, fault, mutated, monkeypatch):
    from rl_kernels.linear_logprob import triton_impl

    tensors, options = problem(35, 20, 70), {"temperature": 0.6}
    expected = results(linear_logprob_reference, *tensors, **options)
    broken = mutated(triton_impl, *FAULTS[fault])
    for launcher in ("statistics", "gradient_block", "block_statistics", "block_gradients"):
        monkeypatch.setattr(triton_impl, launcher, getattr(broken, launcher))
    errors = [relative_error(a, e) for a, e in zip(results(triton, *tensors, **options), expected, strict=True)]
    assert max(errors) > 1e-3


def worker(rank, folder, impl):
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    hidden_TH, weight_VH, labels_T = (tensor.cpu() for tensor in problem(21, 6, 26))
    half = results(partial(linear_logprob, impl=impl), hidden_TH, weight_VH.chunk(2)[rank], labels_T,
                   group=dist.group.WORLD, temperature=0.8)
    torch.save(half, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("impl", ["triton", "fused"])
def test_two_vocabulary_shards_over_gloo_equal_one_process(impl, tmp_path):
    mp.spawn(worker, args=(str(tmp_path), impl), nprocs=2, join=True)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    expected = results(linear_logprob_reference, *problem(21, 6, 26), temperature=0.8)
    both = [first[0], first[1], first[2] + second[2], torch.cat([first[3], second[3]])]
    for actual, reference in zip(both, expected, strict=True):
        torch.testing.assert_close(actual, reference.cpu(), rtol=2e-5, atol=2e-5)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
