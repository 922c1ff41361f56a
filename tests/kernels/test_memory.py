"""No kernel touches memory that is not its own, and none leaves the value of an element to the order of programs."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rl_kernels.grouped_experts import grouped_experts, sorted_experts
from rl_kernels.linear_logprob import linear_logprob
from rl_kernels.pointwise import rotate, weighted_swiglu
from rl_kernels.router_topk import router_topk
from tests.kernels import test_grouped_experts as experts
from tests.kernels import test_linear_logprob_triton as logprob
from tests.kernels import test_pointwise as pointwise
from tests.kernels import test_router_topk as router
from tests.kernels.conftest import DEVICE
from tests.kernels.memory_check import watched
from tests.kernels.test_compile_for_gpu import KERNELS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(DEVICE == "cuda", reason="watches the interpreter")]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 2), (16, 16, 32), (35, 20, 70)])
def test_linear_logprob(shape, dtype):
    with watched() as launched:
        for impl in ("triton", "fused"):
            logprob.results(partial(linear_logprob, impl=impl), *logprob.problem(*shape, dtype))
    assert set(launched) == KERNELS["linear_logprob"] | {"block_statistics_kernel"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_pointwise(dtype):
    with watched() as launched:
        for rows, width in pointwise.ROWS_AND_WIDTHS:
            pointwise.with_gradients(lambda *each: weighted_swiglu(*each, impl="triton"),
                                     pointwise.random(rows, 2 * width, dtype=dtype), pointwise.random(rows, 1),
                                     upstream=pointwise.random(rows, width))
        for tokens, heads, dim, turned in pointwise.HEADS:
            cosine, sine = pointwise.angles(tokens, turned)
            pointwise.with_gradients(
                lambda both: rotate(both[..., dim:], cosine, sine, impl="triton"),  # noqa: B023
                pointwise.random(tokens, heads, 2 * dim, dtype=dtype), upstream=pointwise.random(tokens, heads, dim))
    assert set(launched) == KERNELS["pointwise"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 3, 2, 1), (32, 2, 3, 16, 16), (45, 3, 5, 20, 18)])
def test_grouped_experts(shape, dtype):
    with watched() as launched:
        experts.results(grouped_experts, *experts.problem(*shape, dtype), impl="triton")
    assert set(launched) == KERNELS["grouped_experts"]


def test_experts_that_are_separate_parameters():
    rows_NH, gate_up, down, indices_N1, weights_N1 = experts.problem(20, 1, 3, 18, 7)
    counts_E = torch.bincount(indices_N1[indices_N1 >= 0], minlength=3)
    leaves = [matrix.clone().requires_grad_() for matrix in (*gate_up, *down)]
    rows_NH, weights_N = rows_NH[:int(counts_E.sum())], weights_N1[:int(counts_E.sum()), 0]
    with watched(leaves):
        sorted_experts(rows_NH, leaves[:3], leaves[3:], counts_E, weights_N, impl="triton").sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 2, 1), (32, 16, 16, 2), (37, 36, 20, 6)])
def test_router_topk(shape, dtype):
    *sizes, choices = shape
    hidden_TH, weight_EH, real_T = router.problem(*sizes, dtype)
    with watched() as launched:
        router.results(router_topk, hidden_TH, weight_EH, choices, real_T=real_T, impl="triton")
        router.results(router_topk, hidden_TH, weight_EH, choices, impl="triton",
                                 indices_TK=torch.arange(choices).expand(len(hidden_TH), -1))
    assert set(launched) == KERNELS["router_topk"]


def test_a_read_past_the_end_and_an_element_written_twice_show():
    """The watch itself: with one row too few declared, and with one row that belongs to two experts."""
    from rl_kernels.grouped_experts import triton_impl
    tensors = experts.problem(20, 1, 3, 16, 16)
    with watched(), pytest.raises(Exception, match="not its own"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_impl, "_on_device", lambda numbers, device: torch.tensor([n + 1 for n in numbers]))
        experts.results(grouped_experts, *tensors, impl="triton")
    table = triton_impl.block_table
    with watched(), pytest.raises(AssertionError, match="writes an element twice"), \
            pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_impl, "block_table", lambda *args: table(*args).repeat(1, 2).contiguous())
        experts.results(grouped_experts, *tensors, impl="triton")
