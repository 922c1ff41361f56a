"""Every implementation of linear_logprob against float64 of the very same inputs, held to an error budget.

Outputs: 1e-4 nats. Gradients: rounding to the inputs' type, which is how they are handed on, and 1e-4 of the largest.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rl_kernels.linear_logprob import linear_logprob, linear_logprob_reference, op, products
from tests.kernels.conftest import DEVICE

NATS = 1e-4
UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
MARKS = {"triton": pytest.mark.slow, "fused": pytest.mark.slow,
         "liger": pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None,
                                     reason="liger-kernel is not installed")}
CASES = [pytest.param(impl, dtype, marks=MARKS[impl] if impl in MARKS else ())
         for impl in ("chunked", "reference", "triton", "fused", "liger") for dtype in DTYPES
         if dtype != torch.float64 or impl not in MARKS]  # those three compute in float32
# tokens, hidden, vocabulary, standard deviation of the logits: one row; nothing a multiple of a tile; peaked; wide
SHAPES = [(1, 3, 2, 1.0), (13, 37, 71, 3.0), (19, 40, 150, 10.0), (24, 256, 1500, 5.0)]


def problem(tokens, hidden, vocab, deviation, dtype):
    generator = torch.Generator().manual_seed(1)
    hidden_TH = torch.randn(tokens, hidden, generator=generator).to(DEVICE, dtype)
    weight_VH = (torch.randn(vocab, hidden, generator=generator) * deviation / hidden**0.5).to(DEVICE, dtype)
    labels_T = torch.randint(vocab, (tokens,), generator=generator)
    labels_T[1::5] = -100
    scale_H = torch.linspace(0.3, 1.7, hidden)
    return hidden_TH, weight_VH, labels_T.to(DEVICE), scale_H.to(DEVICE)


def outputs_and_gradients(function, hidden_TH, weight_VH, labels_T, **options):
    """The loss has gradients of size 1 at each token's outputs, as the budget in nats assumes."""
    hidden_TH, weight_VH = hidden_TH.detach().requires_grad_(), weight_VH.detach().requires_grad_()
    logprobs_T, entropy_T = function(hidden_TH, weight_VH, labels_T, **options)
    mix_T = torch.linspace(-1.0, 1.0, labels_T.numel(), device=DEVICE, dtype=torch.float64)
    loss = (mix_T * logprobs_T).sum() + (mix_T.flip(0) * entropy_T).sum()
    loss.backward()
    return (logprobs_T.detach(), entropy_T.detach()), (hidden_TH.grad, weight_VH.grad)


def assert_within_budget(impl, hidden_TH, weight_VH, labels_T, **options):
    dtype = hidden_TH.dtype
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    exact, exact_gradients = outputs_and_gradients(linear_logprob_reference, hidden_TH.double(), weight_VH.double(),
                                                   labels_T, **wide)
    found, gradients = outputs_and_gradients(linear_logprob, hidden_TH, weight_VH, labels_T, impl=impl, chunk_tokens=7,
                                             **options)
    for name, ours, truth in zip(("logprob", "entropy"), found, exact, strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        assert float((ours - truth).abs().max()) <= NATS, name
    for name, ours, truth in zip(("hidden", "weight"), gradients, exact_gradients, strict=True):
        assert ours.dtype == dtype and bool(truth.abs().max() > 0.01), name
        # float16 cannot hold numbers below 2^-25
        allowed = 1.01 * UNIT_ROUNDOFF[dtype] * truth.abs() + NATS * truth.abs().max() + \
            (2.0**-25 if dtype == torch.float16 else 0.0)
        excess = (ours.double() - truth).abs() - allowed
        assert float(excess.max()) <= 0, f"gradient of {name}: {float(excess.max()):.2e} beyond the budget"


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:3])))
def test_error_budget_against_float64_of_the_same_inputs(impl, shape, dtype, scaled):
    if impl in ("triton", "fused") and DEVICE == "cpu" and shape is SHAPES[-1]:
        pytest.skip("minutes in Triton's interpreter")
    *tensors, scale_H = problem(*shape, dtype)
    assert_within_budget(impl, *tensors, temperature=0.7, column_scale_H=scale_H if scaled else None)


FAULTS = {
    "logits are rounded": ("multiply", lambda left, right: (left.to(right.dtype) @ right).to(torch.float32)),
    "gradients of logits are rounded": ("parts", lambda left, dtype: (left.to(dtype),)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rounding_on_the_way_is_out_of_budget(fault, monkeypatch):
    name, broken = FAULTS[fault]
    for module in (products, op, op.chunked):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError):
        assert_within_budget("chunked", *problem(*SHAPES[3], torch.bfloat16)[:3])


class Products(TorchDispatchMode):
    """Records (dtypes of the factors, dtype of the result) of every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            *_, left, right = [each for each in args if isinstance(each, torch.Tensor)]
            self.seen.append((left.dtype, right.dtype, result.dtype))
        return result


@pytest.fixture()
def torch_as_released(monkeypatch):
    """Without megatron_rl.compat's factories, which make CPU tensors once a test of this process imports Megatron."""
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like", "ones_like"):
        factory = getattr(torch, name)
        monkeypatch.setattr(torch, name, vars(factory)["__wrapped__"] if hasattr(factory, "__wrapped__") else factory)


@pytest.mark.parametrize("scaled", [False, True])
def test_on_a_gpu_every_product_takes_bfloat16_and_returns_float32(scaled, torch_as_released):
    """On tensors that only claim to be on a GPU: matrix units are used, and nothing that they return is rounded."""
    with FakeTensorMode(), Products() as products_made:
        hidden_TH, weight_VH = (torch.empty(rows, 16, device="cuda:0", dtype=torch.bfloat16) for rows in (6, 40))
        labels_T, g_T = torch.zeros(6, dtype=torch.int64, device="cuda:0"), torch.empty(6, device="cuda:0")
        scale_H = torch.ones(16, device="cuda:0") if scaled else None
        head = op._Head(op.chunked, 0.7, 4, 0, 40, None, True, False)
        _, entropy_T, lse_T = op._forward(hidden_TH, weight_VH, labels_T, scale_H, head)
        op._backward(hidden_TH, weight_VH, labels_T, scale_H, lse_T, entropy_T, head, g_T, g_T, (True, True))
    # two chunks of tokens: logits twice (each in two parts if scaled), two gradients of two parts each
    assert len(products_made.seen) == 2 * (2 * (1 + scaled) + 2 * 2)
    assert set(products_made.seen) == {(torch.bfloat16, torch.bfloat16, torch.float32)}
