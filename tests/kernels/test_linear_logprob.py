"""linear_logprob against the naive reference: values, both gradients, and the memory it exists for."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rl_kernels.linear_logprob import linear_logprob, linear_logprob_reference, op
from rl_kernels.linear_logprob.chunked import block_columns

IGNORED = -100


def problem(tokens, hidden, vocab, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VH = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels_T = torch.randint(vocab, (tokens,), generator=generator)
    labels_T[::5] = IGNORED
    return hidden_TH, weight_VH, labels_T


def values_and_gradients(op, hidden_TH, weight_VH, labels_T, **options):
    """Outputs and gradients of a loss in which both outputs count, differently at every token."""
    hidden_TH, weight_VH = hidden_TH.detach().requires_grad_(), weight_VH.detach().requires_grad_()
    logprobs_T, entropy_T = op(hidden_TH, weight_VH, labels_T, **options)
    mix_T = torch.linspace(-1.0, 2.0, labels_T.numel(), dtype=logprobs_T.dtype)
    loss = (mix_T * logprobs_T).sum() + (mix_T.flip(0) * entropy_T).sum()
    loss.backward()
    return logprobs_T.detach(), entropy_T.detach(), hidden_TH.grad, weight_VH.grad


def assert_all_close(actual, expected, **tolerances):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerances)


@pytest.mark.parametrize(("tokens", "hidden", "vocab", "chunk"), [(13, 7, 31, 4), (1, 3, 2, 1024), (16, 8, 17, 16)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("scaled", [False, True])
def test_values_and_both_gradients_equal_the_reference(tokens, hidden, vocab, chunk, temperature, scaled):
    hidden_TH, weight_VH, labels_T = problem(tokens, hidden, vocab)
    scale_H = torch.linspace(0.2, 1.7, hidden) if scaled else None
    options = {"temperature": temperature, "column_scale_H": scale_H}
    expected = values_and_gradients(linear_logprob_reference, hidden_TH, weight_VH, labels_T, **options)
    actual = values_and_gradients(linear_logprob, hidden_TH, weight_VH, labels_T, chunk_tokens=chunk, **options)
    assert_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_golden_two_word_vocabulary():
    # Logits (ln 3, 0): p = (3/4, 1/4). Label 0: ln 3/4. H = ln 4 - 3/4 ln 3.
    # d logprob / d logits = (1 - 3/4, -1/4); d H / d logit_j = -p_j (ln p_j + H): for j = 0,
    # -3/4 (ln 3 - ln 4 + ln 4 - 3/4 ln 3) = -3/16 ln 3, and + 3/16 ln 3 for j = 1. W is the identity.
    hidden_TH = torch.tensor([[math.log(3.0), 0.0]], requires_grad=True)
    logprobs_T, entropy_T = linear_logprob(hidden_TH, torch.eye(2), torch.tensor([0]))
    assert logprobs_T.item() == pytest.approx(math.log(0.75), abs=1e-6)
    assert entropy_T.item() == pytest.approx(math.log(4.0) - 0.75 * math.log(3.0), abs=1e-6)
    (grad_of_logprob,) = torch.autograd.grad(logprobs_T.sum(), hidden_TH, retain_graph=True)
    (grad_of_entropy,) = torch.autograd.grad(entropy_T.sum(), hidden_TH)
    torch.testing.assert_close(grad_of_logprob, torch.tensor([[0.25, -0.25]]))
    slope = 3 / 16 * math.log(3.0)
    torch.testing.assert_close(grad_of_entropy, torch.tensor([[-slope, slope]]))


def test_a_label_that_nobody_looked_at_gives_nan(monkeypatch):
    """On a GPU labels are not looked at, since that would stop the host; a step that is not finite changes nothing."""
    monkeypatch.setattr(op, "_validate", lambda *_: None)
    logprobs_T, _ = linear_logprob(torch.ones(3, 2), torch.eye(2), torch.tensor([1, 2, IGNORED]))
    assert logprobs_T.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("rows", [1, 700, 1024, 5000, 100_000])
def test_blocks_start_where_matrix_units_can_load_them(rows, device):
    assert block_columns(rows, torch.device(device)) % 128 == 0


def test_gradcheck_in_float64():
    hidden_TH, weight_VH, labels_T = problem(6, 4, 9, dtype=torch.float64)
    scale_H = torch.linspace(0.5, 1.5, 4, dtype=torch.float64)

    def both(hidden, weight):
        return linear_logprob(hidden, weight, labels_T, temperature=0.7, column_scale_H=scale_H, chunk_tokens=4)

    assert torch.autograd.gradcheck(both, (hidden_TH, weight_VH))


def test_float64_is_computed_in_float64():
    hidden_TH, weight_VH, labels_T = problem(11, 6, 23, dtype=torch.float64)
    expected = values_and_gradients(linear_logprob_reference, hidden_TH, weight_VH, labels_T)
    actual = values_and_gradients(linear_logprob, hidden_TH, weight_VH, labels_T, chunk_tokens=3)
    assert_all_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_chunk_size_does_not_change_the_result():
    hidden_TH, weight_VH, labels_T = problem(23, 5, 19, dtype=torch.float64)
    whole = values_and_gradients(linear_logprob, hidden_TH, weight_VH, labels_T, chunk_tokens=23)
    for chunk in (1, 2, 7, 22, 1000):
        actual = values_and_gradients(linear_logprob, hidden_TH, weight_VH, labels_T, chunk_tokens=chunk)
        assert_all_close(actual, whole, rtol=1e-12, atol=1e-12)


def test_ignored_rows_are_zero_even_when_they_hold_nan():
    hidden_TH, weight_VH, labels_T = problem(10, 6, 15)
    ignored_T = labels_T < 0
    clean = values_and_gradients(linear_logprob, hidden_TH, weight_VH, labels_T, chunk_tokens=4)
    poisoned_TH = torch.where(ignored_T[:, None], torch.nan, hidden_TH.detach())
    actual = values_and_gradients(linear_logprob, poisoned_TH, weight_VH, labels_T, chunk_tokens=4)
    assert_all_close(actual, clean, rtol=0, atol=0)
    logprobs_T, entropy_T, grad_TH, _ = actual
    for values in (logprobs_T, entropy_T, grad_TH):
        assert bool((values[ignored_T] == 0).all())


def test_nan_gradient_at_an_ignored_row_does_not_spread():
    hidden_TH, weight_VH, labels_T = problem(5, 4, 8)
    logprobs_T, entropy_T = linear_logprob(hidden_TH, weight_VH, labels_T)
    incoming_T = torch.where(labels_T < 0, torch.nan, 1.0)
    torch.autograd.backward((logprobs_T, entropy_T), (incoming_T, incoming_T))
    assert bool(torch.isfinite(hidden_TH.grad).all()) and bool(torch.isfinite(weight_VH.grad).all())


def test_large_logits_stay_exact():
    # Logits (1000, 999): log-prob of label 1 is -1 - ln(1 + 1/e), as for logits (1, 0).
    logprobs_T, entropy_T = linear_logprob(torch.tensor([[1000.0, 999.0]]), torch.eye(2), torch.tensor([1]))
    p = 1 / (1 + math.exp(-1))
    assert logprobs_T.item() == pytest.approx(math.log(1 - p), abs=1e-4)
    assert entropy_T.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-6)


def test_rounded_logits_are_those_of_a_head_that_is_not_float32():
    """Against a float32 softmax of logits rounded to bfloat16; other logits than without `rounded`."""
    hidden_TH, weight_VH, labels_T = problem(12, 8, 64, dtype=torch.bfloat16)
    exact = values_and_gradients(linear_logprob, hidden_TH, weight_VH, labels_T)
    logits_TV = (hidden_TH.float() @ weight_VH.float().T).bfloat16().float()
    expected_T = torch.log_softmax(logits_TV, -1).gather(1, labels_T.clamp(min=0)[:, None])[:, 0]
    both = [values_and_gradients(linear_logprob, hidden_TH, weight_VH, labels_T, rounded=True, impl=impl)
            for impl in ("chunked", "reference")]
    for logprobs_T, *_ in both:
        torch.testing.assert_close(logprobs_T, torch.where(labels_T < 0, 0.0, expected_T), rtol=1e-5, atol=1e-5)
        assert float((logprobs_T - exact[0]).abs().max()) > 1e-3
    for ours, theirs in zip(both[0][2:], both[1][2:], strict=True):  # autograd rounds the logits' gradient too
        assert float((ours - theirs).norm() / theirs.norm()) < 0.01
    with pytest.raises(ValueError, match="impl='triton' does not round logits"):
        linear_logprob(hidden_TH, weight_VH, labels_T, rounded=True, impl="triton")


def test_bfloat16_weight_gradient_accumulates_in_float32():
    # One-row chunks that each add 2^-9 to a gradient that starts at 1 would all be lost in bfloat16, whose
    # spacing at 1 is 2^-7. W = 0, V = 2, so p = 1/2 and d logprob / d logit_label = g / 2; h = 1.
    tokens = 257
    hidden_TH = torch.ones(tokens, 1, dtype=torch.bfloat16)
    weight_VH = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    incoming_T = torch.full((tokens,), 2.0 ** -8)
    incoming_T[0] = 2.0
    logprobs_T, _ = linear_logprob(hidden_TH, weight_VH, torch.zeros(tokens, dtype=torch.int64), chunk_tokens=1)
    logprobs_T.backward(incoming_T)
    assert weight_VH.grad.dtype == torch.bfloat16
    assert weight_VH.grad.flatten().tolist() == [1.5, -1.5]  # 1 + 256 * 2^-9


def test_only_the_wanted_gradient_is_made():
    """Both outputs give the gradient of the operand that asks for one, and no other."""
    hidden_TH, weight_VH, labels_T = problem(6, 4, 8)
    for output in (0, 1):
        reference = linear_logprob_reference(hidden_TH, weight_VH, labels_T)[output].sum()
        wanted = torch.autograd.grad(reference, (hidden_TH, weight_VH))
        for operand, expected in enumerate(wanted):
            given = [tensor.detach().clone().requires_grad_(place == operand)
                     for place, tensor in enumerate((hidden_TH, weight_VH))]
            linear_logprob(*given, labels_T)[output].sum().backward()
            torch.testing.assert_close(given[operand].grad, expected)
            assert given[1 - operand].grad is None and float(expected.abs().max()) > 0.01


def values_of_logprob_gradient(hidden_TH, weight_VH, labels_T):
    logprobs_T, _ = linear_logprob_reference(hidden_TH, weight_VH, labels_T)
    return torch.autograd.grad(logprobs_T.sum(), (hidden_TH, weight_VH))


def test_without_entropy_the_logprobs_and_their_gradients_are_the_same():
    hidden_TH, weight_VH, labels_T = problem(9, 4, 8)
    logprobs_T, entropy_T = linear_logprob(hidden_TH, weight_VH, labels_T, with_entropy=False, chunk_tokens=4)
    assert entropy_T is None
    torch.testing.assert_close(logprobs_T, linear_logprob_reference(hidden_TH, weight_VH, labels_T)[0])
    actual = torch.autograd.grad(logprobs_T.sum(), (hidden_TH, weight_VH))
    assert_all_close(actual, values_of_logprob_gradient(hidden_TH, weight_VH, labels_T), rtol=1e-5, atol=1e-5)


def test_column_scale_gets_no_gradient():
    hidden_TH, weight_VH, labels_T = problem(5, 4, 8)
    scale_H = torch.ones(4, requires_grad=True)
    linear_logprob(hidden_TH, weight_VH, labels_T, column_scale_H=scale_H)[0].sum().backward()
    assert scale_H.grad is None and hidden_TH.grad is not None
    frozen = linear_logprob(hidden_TH.detach(), weight_VH.detach(), labels_T, column_scale_H=scale_H)
    assert not frozen[0].requires_grad  # a scale alone must not keep a graph alive


def test_no_tokens_give_no_values_and_zero_gradients():
    hidden_TH, weight_VH = torch.zeros(0, 4, requires_grad=True), torch.ones(8, 4, requires_grad=True)
    logprobs_T, entropy_T = linear_logprob(hidden_TH, weight_VH, torch.zeros(0, dtype=torch.int64))
    (logprobs_T.sum() + entropy_T.sum()).backward()
    assert logprobs_T.numel() == entropy_T.numel() == 0
    assert bool((weight_VH.grad == 0).all())


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_holds_the_logits_of_all_tokens():
    tokens, hidden, vocab, chunk = 64, 4, 50, 8
    hidden_TH, weight_VH, labels_T = problem(tokens, hidden, vocab)
    with LargestTensor() as naive:
        values_and_gradients(linear_logprob_reference, hidden_TH, weight_VH, labels_T)
    assert naive.elements >= tokens * vocab  # the spy sees what it should see
    with LargestTensor() as largest:
        values_and_gradients(linear_logprob, hidden_TH, weight_VH, labels_T, chunk_tokens=chunk)
    assert largest.elements <= chunk * vocab


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_without_gradient_nothing_is_saved(grad_enabled):
    hidden_TH, weight_VH, labels_T = problem(6, 4, 8)
    if grad_enabled:
        hidden_TH, weight_VH = hidden_TH.detach(), weight_VH.detach()
    packed = []
    with torch.set_grad_enabled(grad_enabled), torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: packed.append(tensor), lambda tensor: tensor):
        logprobs_T, entropy_T = linear_logprob(hidden_TH, weight_VH, labels_T)
    assert logprobs_T.grad_fn is None and entropy_T.grad_fn is None
    assert packed == []


def test_backward_saves_no_logits():
    tokens, vocab = 32, 50
    hidden_TH, weight_VH, labels_T = problem(tokens, 4, vocab)
    saved_elements = []

    def pack(tensor):
        saved_elements.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_logprob(hidden_TH, weight_VH, labels_T, chunk_tokens=8)
    # hidden, weight, labels, log-sum-exp, entropy
    assert sorted(saved_elements) == sorted([tokens * 4, vocab * 4, tokens, tokens, tokens])


GOOD = {"hidden_TH": torch.ones(3, 4), "weight_VH": torch.ones(5, 4), "labels_T": torch.zeros(3, dtype=torch.int64)}


@pytest.mark.parametrize(("changed", "message"), [
    ({"hidden_TH": torch.ones(3, 6)}, "same H"),
    ({"hidden_TH": torch.ones(3, 1, 4)}, "same H"),
    ({"labels_T": torch.zeros(4, dtype=torch.int64)}, "labels_T must be"),
    ({"labels_T": torch.zeros(3)}, "int64"),
    ({"labels_T": torch.tensor([0, 5, 1])}, "beyond the vocabulary of 5"),
    ({"weight_VH": torch.ones(5, 4, dtype=torch.bfloat16)}, "floating dtype"),
    ({"weight_VH": torch.ones(0, 4)}, "no rows"),
    ({"column_scale_H": torch.ones(3)}, "column_scale_H"),
    ({"temperature": 0.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"chunk_tokens": 0}, "chunk_tokens"),
])
def test_bad_input_is_named(changed, message):
    arguments = GOOD | changed
    with pytest.raises(ValueError, match=message):
        linear_logprob(arguments.pop("hidden_TH"), arguments.pop("weight_VH"), arguments.pop("labels_T"), **arguments)


def test_liger_equals_the_reference_or_says_that_it_is_missing():
    hidden_TH, weight_VH, labels_T = problem(13, 7, 31)
    options = {"temperature": 0.6, "column_scale_H": torch.linspace(0.2, 1.7, 7)}
    if importlib.util.find_spec("liger_kernel") is None:
        with pytest.raises(ValueError, match="impl='liger' needs liger-kernel"):
            linear_logprob(hidden_TH, weight_VH, labels_T, impl="liger", **options)
        return
    expected = values_and_gradients(linear_logprob_reference, hidden_TH, weight_VH, labels_T, **options)
    actual = values_and_gradients(linear_logprob, hidden_TH, weight_VH, labels_T, impl="liger", **options)
    assert_all_close(actual, expected, rtol=1e-5, atol=1e-5)
