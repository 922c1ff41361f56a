"""grouped_experts in every implementation against the reference: values, all gradients, and faults that must show."""

from __future__ import annotations

import pytest
import torch

from rl_kernels.grouped_experts import LowRank, grouped_experts, grouped_experts_reference, sorted_experts
from tests.kernels.conftest import DEVICE

BF16_MARGIN = 1.5
"""The kernel's error against float32 may be this many times the error of the loop in torch's bfloat16."""
CPU_ONLY = pytest.mark.skipif(DEVICE == "cuda", reason="torch._grouped_mm takes bfloat16 only on CUDA")
IMPLEMENTATIONS = ["loop", pytest.param("grouped_mm", marks=CPU_ONLY),
                   pytest.param("triton", marks=pytest.mark.slow)]
NAMES = ("output", "grad hidden", "grad gate_up", "grad down", "grad weights")


def problem(tokens, choices, experts, hidden, width, dtype=torch.float32, seed=0):
    """Expert 1 gets no token; some slots belong to no expert of this rank."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    scores_TE = normal(tokens, experts)
    scores_TE[:, 1:2] = -100.0
    indices_TK = scores_TE.topk(choices).indices
    indices_TK[::4, 0] = -1
    tensors = (normal(tokens, hidden), normal(experts, 2 * width, hidden) / hidden**0.5,
               normal(experts, hidden, width) / width**0.5)
    weights_TK = torch.rand(tokens, choices, generator=generator) + 0.1
    return *(tensor.to(DEVICE, dtype) for tensor in tensors), indices_TK.to(DEVICE), weights_TK.to(DEVICE)


def fitting(impl, shape):
    """The shape, with H and F rounded up to what torch._grouped_mm takes."""
    tokens, choices, experts, *sizes = shape
    return tokens, choices, experts, *(-(-size // 8) * 8 if impl == "grouped_mm" else size for size in sizes)


def results(function, hidden_TH, gate_up, down, indices_TK, weights_TK, **options):
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden_TH, gate_up, down, weights_TK)]
    out_TH = function(leaves[0], leaves[1], leaves[2], indices_TK, leaves[3], **options)
    mix_TH = torch.linspace(-1.0, 2.0, out_TH.numel(), device=out_TH.device).view_as(out_TH)
    (out_TH.float() * mix_TH.flip(0)).sum().backward()
    return [out_TH.detach(), *(leaf.grad for leaf in leaves)]


def relative_error(actual, expected) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


# One token and one expert; nothing a multiple of a tile; several tiles in every direction; sorted rows (K = 1).
SHAPES = [(1, 1, 3, 2, 1), (13, 2, 4, 7, 5), (45, 3, 5, 20, 18), (20, 1, 3, 16, 16)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_every_gradient_equal_the_reference(impl, shape):
    tensors = problem(*fitting(impl, shape))
    for actual, expected in zip(results(grouped_experts, *tensors, impl=impl),
                                results(grouped_experts_reference, *tensors), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_expert_without_tokens_gets_a_zero_gradient(impl):
    _, _, grad_gate_up, grad_down, _ = results(grouped_experts, *problem(*fitting(impl, SHAPES[1])), impl=impl)
    assert bool((grad_gate_up[1] == 0).all()) and bool((grad_down[1] == 0).all())
    assert all(bool(grad[expert].any()) for grad in (grad_gate_up, grad_down) for expert in (0, 2, 3))


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
def test_sorted_rows_and_separate_matrices_give_what_slots_and_stacked_ones_give(impl):
    """As in Megatron's layer: each expert's matrices are parameters of their own, with gradients of their own."""
    hidden_NH, gate_up, down, indices_N1, weights_N1 = problem(*fitting(impl, (20, 1, 3, 16, 16)))
    indices_N1 = torch.where(indices_N1 < 0, 0, indices_N1).sort(0).values
    expected = results(grouped_experts_reference, hidden_NH, gate_up, down, indices_N1, weights_N1)
    counts_E = torch.bincount(indices_N1[:, 0], minlength=3)
    assert counts_E[1] == 0
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden_NH, *gate_up, *down, weights_N1[:, 0])]

    def sorted_rows(*_, **options):
        return sorted_experts(leaves[0], leaves[1:4], leaves[4:7], counts_E, leaves[7], **options)

    out_NH = results(sorted_rows, hidden_NH, gate_up, down, indices_N1, weights_N1, impl=impl)[0]
    grads = [leaf.grad for leaf in leaves]
    actual = [out_NH, grads[0], torch.stack(grads[1:4]), torch.stack(grads[4:7]), grads[7][:, None]]
    for name, ours, truth in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [0, 6])
def test_no_slots_at_all_give_zeros(impl, tokens):
    hidden_TH, gate_up, down, indices_TK, weights_TK = problem(*fitting(impl, (8, 2, 3, 4, 3)))
    tensors = hidden_TH[:tokens], gate_up, down, torch.full_like(indices_TK[:tokens], -1), weights_TK[:tokens]
    assert all(bool((value == 0).all()) for value in results(grouped_experts, *tensors, impl=impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_slot_of_no_expert_touches_nothing_even_when_it_holds_nan(impl):
    hidden_TH, gate_up, down, indices_TK, weights_TK = problem(*fitting(impl, SHAPES[1]))
    indices_TK[5] = -1
    clean = results(grouped_experts, hidden_TH, gate_up, down, indices_TK, weights_TK, impl=impl)
    hidden_TH[5], weights_TK[5] = torch.nan, torch.nan
    for actual, expected in zip(results(grouped_experts, hidden_TH, gate_up, down, indices_TK, weights_TK, impl=impl),
                                clean, strict=True):
        assert torch.equal(actual, expected)


@CPU_ONLY
@pytest.mark.parametrize("tokens", [13, 0])
def test_what_torch_leaves_unwritten_on_a_gpu_touches_nothing(tokens, monkeypatch):
    """As is reported of CUDA: torch._grouped_mm writes no row of no expert, no gradient of an expert without rows, and
    refuses to contract over no rows at all."""
    real, calls = torch._grouped_mm, []

    def as_on_a_gpu(left, right, offs):
        assert left.numel() > 0 and (left.is_contiguous() or left.t().is_contiguous())
        if right.dim() == 3:
            unwritten = torch.arange(len(left))[:, None] >= offs[-1]
        else:
            unwritten = offs.diff(prepend=offs.new_zeros(1))[:, None, None] == 0
        calls.append(right.dim())
        return torch.where(unwritten, torch.nan, real(left, right, offs=offs))

    hidden_TH, gate_up, down, indices_TK, weights_TK = problem(*fitting("grouped_mm", SHAPES[1]))
    tensors = hidden_TH[:tokens], gate_up, down, indices_TK[:tokens], weights_TK[:tokens]
    expected = results(grouped_experts, *tensors, impl="loop")
    monkeypatch.setattr(torch, "_grouped_mm", as_on_a_gpu)
    for actual, truth in zip(results(grouped_experts, *tensors, impl="grouped_mm"), expected, strict=True):
        torch.testing.assert_close(actual, truth, rtol=2e-5, atol=2e-5)
    assert sorted(calls) == ([2, 2, 3, 3, 3, 3] if tokens else [])  # of two matrices: forward, to rows, to weights


def test_autograd_keeps_neither_a_stack_of_the_experts_nor_what_can_be_computed_again():
    """The parameters themselves, and of N rows the input, both halves before the SwiGLU, its output and the weights."""
    hidden_NH, gate_up, down, _, weights_N1 = problem(*fitting("grouped_mm", (20, 1, 3, 16, 24)))
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    rows, *matrices = (tensor.to(dtype).requires_grad_() for tensor in (hidden_NH, *gate_up, *down))
    weights_N = weights_N1[:, 0].clone().requires_grad_()
    counts_E, kept = torch.tensor([12, 0, 8], device=DEVICE), {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sorted_experts(rows, matrices[:3], matrices[3:], counts_E, weights_N, impl="grouped_mm")
    parameters = {matrix.data_ptr() for matrix in matrices}
    assert parameters <= kept.keys()
    others = sorted(tensor.numel() for address, tensor in kept.items()
                    if address not in parameters and tensor.is_floating_point())
    assert others == sorted([20 * 16, 20 * 2 * 24, 20 * 24, 20])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS[1:])
def test_bfloat16_error_is_within_the_budget(impl):
    tensors = problem(48, 2, 4, 32, 24, torch.bfloat16)
    exact = results(grouped_experts_reference, *(t.float() if t.is_floating_point() else t for t in tensors))
    ours, torch_own = (results(grouped_experts, *tensors, impl=name) for name in (impl, "loop"))
    for name, kernel, theirs, truth in zip(NAMES, ours, torch_own, exact, strict=True):
        assert relative_error(kernel, truth) <= BF16_MARGIN * relative_error(theirs, truth), name


FAULTS = {
    "last row of a block": ("    mask = rows < end\n    slot", "    mask = rows < end - 1\n    slot"),
    "routing weight": ("gate * tl.sigmoid(gate) * up * weight", "gate * tl.sigmoid(gate) * up"),
    "derivative of silu": ("sigmoid * (1.0 + gate - silu)", "sigmoid"),
    "gradient of the weight": ("tl.sum(grad * silu * up, 1)", "tl.sum(grad * silu, 1)"),
    "last row of a weight gradient": ("        mask = rows < end\n", "        mask = rows < end - 1\n"),
    "scatter to the row": ("store(out + slot[:, None] * Y", "store(out + rows[:, None] * Y"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_shows(fault, mutated, monkeypatch):
    from rl_kernels.grouped_experts import triton_impl

    tensors = problem(24, 2, 3, 18, 17)
    expected = results(grouped_experts_reference, *tensors)
    broken = mutated(triton_impl, *FAULTS[fault])
    monkeypatch.setattr(triton_impl, "triton_experts", broken.triton_experts)
    errors = [relative_error(a, e) for a, e in zip(results(grouped_experts, *tensors, impl="triton"), expected,
                                                   strict=True)]
    assert not max(errors) <= 1e-3


GOOD = {"hidden_TH": torch.ones(3, 4), "gate_up_E2FH": torch.ones(2, 6, 4), "down_EHF": torch.ones(2, 4, 3),
        "indices_TK": torch.zeros(3, 1, dtype=torch.int64), "weights_TK": torch.ones(3, 1)}


@pytest.mark.parametrize(("changed", "message"), [
    ({"hidden_TH": torch.ones(3, 5)}, "share E, F and H"),
    ({"gate_up_E2FH": torch.ones(2, 3, 4)}, "share E, F and H"),
    ({"weights_TK": torch.ones(3, 2)}, "indices_TK and weights_TK"),
    ({"down_EHF": torch.ones(2, 4, 3).bfloat16()}, "floating dtype"),
    ({"indices_TK": torch.full((3, 1), 2)}, "beyond the 2 experts"),
    ({"indices_TK": torch.zeros(3, 1)}, "int64"),
    ({"impl": "fast"}, "impl='fast'"),
    ({"gate_up_E2FH": [torch.ones(6, 4), torch.ones(4, 4)]}, "wants"),
    ({"down_EHF": [torch.ones(4, 3), torch.ones(4, 3).bfloat16()]}, "down_EHF"),
])
def test_bad_input_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        grouped_experts(**GOOD | changed)


@pytest.mark.parametrize(("counts", "message"), [
    (torch.tensor([1, 1]), "adds up to 2 rows, rows_NH has 3"), (torch.tensor([3]), "int64 .2."),
    (torch.tensor([1.0, 2.0]), "counts_E must be int64")])
def test_bad_counts_are_named(counts, message):
    with pytest.raises(ValueError, match=message):
        sorted_experts(GOOD["hidden_TH"], GOOD["gate_up_E2FH"], GOOD["down_EHF"], counts, torch.ones(3))


@CPU_ONLY
def test_rows_that_torch_would_refuse_are_named():
    with pytest.raises(ValueError, match="multiple of 16 bytes, not H=7, F=5"):
        grouped_experts(*problem(13, 2, 4, 7, 5), impl="grouped_mm")


@pytest.mark.parametrize("impl", ["loop", pytest.param("grouped_mm", marks=CPU_ONLY)])
def test_adapters_add_their_product_to_each_experts_matrix(impl):
    """Values and gradients of rows and both factors are those of the experts with the sum as their matrices."""
    generator = torch.Generator().manual_seed(2)
    experts, rows, hidden, width, rank = 3, 11, 16, 8, 4
    sizes = [(rows, hidden), (experts, 2 * width, hidden), (experts, hidden, width), (experts, rank, hidden),
             (experts, 2 * width, rank), (experts, rank, width), (experts, hidden, rank)]
    tensors = [torch.randn(size, generator=generator) / 3 for size in sizes]
    counts_E, weights_N = torch.tensor([5, 0, 6]), torch.rand(rows, generator=generator)

    def run(adapted):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        rows_NH, gate_up, down, a1, b1, a2, b2 = leaves
        if adapted:
            out_NH = sorted_experts(rows_NH, gate_up, down, counts_E, weights_N, impl=impl,
                                    gate_up_adapter=LowRank(a1, b1, 0.5), down_adapter=LowRank(a2, b2, 0.5))
        else:
            out_NH = sorted_experts(rows_NH, gate_up + 0.5 * b1 @ a1, down + 0.5 * b2 @ a2, counts_E, weights_N,
                                    impl=impl)
        out_NH.square().sum().backward()
        return [out_NH.detach(), *(leaf.grad for leaf in leaves)]

    for actual, expected in zip(run(True), run(False), strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_an_implementation_without_adapters_says_so():
    one = torch.ones(1, 2, 2)
    with pytest.raises(ValueError, match="impl='reference' has no adapters"):
        sorted_experts(torch.ones(1, 2), torch.ones(1, 4, 2), one, torch.tensor([1]), torch.ones(1), impl="reference",
                       down_adapter=LowRank(one, one, 1.0))
