"""SwiGLU with routing weights and the rotation: kernels and torch against float64, gradients, faults that must show."""

from __future__ import annotations

import pytest
import torch

from rl_kernels.pointwise import rotate, weighted_swiglu
from tests.kernels.conftest import DEVICE

IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=pytest.mark.slow)]
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Rows, width: one element; nothing a multiple of a tile; several tiles.
ROWS_AND_WIDTHS = [(1, 1), (13, 37), (35, 48)]
# Tokens, heads, D, rotated dimensions: all of a head; half of it; less than half; more than one tile of rows.
HEADS = [(3, 2, 8, 8), (7, 3, 16, 8), (5, 2, 24, 6), (19, 4, 32, 32)]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def exact_swiglu(gate_up, weights):
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up * (1.0 if weights is None else weights)


def exact_rotation(heads, cosine, sine):
    """As rotations of complex numbers."""
    half = cosine.shape[-1] // 2
    turned = torch.complex(heads[..., :half], heads[..., half:2 * half]) \
        * torch.complex(cosine[..., :half], sine[..., :half])
    return torch.cat([turned.real, turned.imag, heads[..., 2 * half:]], -1)


def with_gradients(function, *tensors, upstream):
    """[value, a gradient for each of tensors that is one]"""
    leaves = [None if each is None else each.detach().requires_grad_() for each in tensors]
    value = function(*leaves)
    value.backward(upstream.to(value.dtype))
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def angles(tokens, dim):
    half = torch.linspace(0.1, 9.0, tokens * dim // 2, device=DEVICE).view(tokens, 1, dim // 2)
    return torch.cat([half, half], -1).cos(), torch.cat([half, half], -1).sin()


def assert_close(found, exact, dtype, roundings):
    for ours, truth in zip(found, exact, strict=True):
        scale = truth.abs().max()
        assert float((ours.double() - truth).abs().max()) <= roundings * UNIT_ROUNDOFF[dtype] * max(scale, 1e-3)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "width"), ROWS_AND_WIDTHS)
def test_swiglu_and_its_gradients_are_those_of_float64(rows, width, impl, dtype, weighted):
    gate_up, upstream = random(rows, 2 * width, dtype=dtype), random(rows, width, dtype=dtype, seed=1)
    weights = random(rows, 1, seed=2).abs() if weighted else None
    found = with_gradients(lambda *each: weighted_swiglu(*each, impl=impl), gate_up, weights, upstream=upstream)
    exact = with_gradients(exact_swiglu, gate_up.double(), None if weights is None else weights.double(),
                           upstream=upstream.double())
    assert found[0].dtype == found[1].dtype == dtype
    # the kernel rounds once, and float32 sums a row; torch rounds after each operation
    assert_close(found[:2], exact[:2], dtype, 1.5 if impl == "triton" and dtype != torch.float32 else 8)
    if weighted:
        assert_close(found[2:], exact[2:], torch.float32 if impl == "triton" else dtype, 4 * width**0.5 + 8)


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tokens", "heads", "dim", "turned"), HEADS)
def test_the_rotation_and_its_gradient_are_those_of_float64(tokens, heads, dim, turned, impl, dtype):
    """Heads as a layer has them: a stretch of the product of queries, keys and values, so with strides of their own."""
    both, upstream = random(tokens, heads, 2 * dim, dtype=dtype), random(tokens, heads, dim, dtype=dtype, seed=1)
    cosine, sine = angles(tokens, turned)
    found = with_gradients(lambda both: rotate(both[..., dim:], cosine, sine, impl=impl), both, upstream=upstream)
    exact = with_gradients(lambda both: exact_rotation(both[..., dim:], cosine.double(), sine.double()), both.double(),
                           upstream=upstream.double())
    assert found[0].dtype == dtype
    assert_close(found, exact, dtype, 1.5 if dtype != torch.float32 else 8)


@pytest.mark.slow
def test_no_rows_are_no_fault():
    assert weighted_swiglu(random(0, 6), random(0, 1), impl="triton").shape == (0, 3)
    assert rotate(random(0, 2, 8), *angles(0, 8), impl="triton").shape == (0, 2, 8)


FAULTS = {
    "an unweighted gradient": ("upstream *= weight[:, None]", "upstream *= 1.0", "swiglu_gradients"),
    "the first tile of a row alone": ("for start in range(0, F, BN):", "for start in range(0, BN, BN):",
                                      "swiglu_gradients"),
    "the slope of silu": ("(1.0 + gate - silu)", "(1.0 + gate)", "swiglu_gradients"),
    "a turn the wrong way": ("first * cos - second * sin", "first * cos + second * sin", "rotated"),
    "strides of the heads": ("token * stride_t + (rows % H) * stride_h", "token * H * D + (rows % H) * D", "rotated"),
    "dimensions that are not turned": ("d + half[None, :], kept", "d + half[None, :], 2.0 * kept", "rotated"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_shows(fault, mutated, monkeypatch):
    from rl_kernels.pointwise import triton_impl

    old, new, launcher = FAULTS[fault]
    monkeypatch.setattr(triton_impl, launcher, getattr(mutated(triton_impl, old, new), launcher))
    with pytest.raises(AssertionError):
        if launcher == "rotated":
            test_the_rotation_and_its_gradient_are_those_of_float64(*HEADS[1], "triton", torch.float32)
        else:
            test_swiglu_and_its_gradients_are_those_of_float64(*ROWS_AND_WIDTHS[1], "triton", torch.float32, True)


def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"\[N, 2F\] and \[N, 1\], not \(3, 5\)"):
        weighted_swiglu(random(3, 5))
    with pytest.raises(ValueError, match=r"and \(2, 1\)"):
        weighted_swiglu(random(3, 4), random(2, 1))
    with pytest.raises(ValueError, match="impl='fast' must be torch or triton"):
        weighted_swiglu(random(3, 4), impl="fast")
    monkeypatch.setattr("rl_kernels.triton_impl.INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a CUDA tensor"):
        rotate(random(3, 2, 8).cpu(), *(each.cpu() for each in angles(3, 8)), impl="triton")
