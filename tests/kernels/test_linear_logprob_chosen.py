"""The head at chosen tokens equals the log-softmax of all logits, with its gradients; the largest are the largest."""

from __future__ import annotations

import pytest
import torch

from rl_kernels.linear_logprob import chosen_logprobs, largest_ids, linear_logprob

TOKENS, HIDDEN, VOCAB, K = 21, 6, 26, 5


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    hidden_TH, weight_VH = (torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
                            for rows in (TOKENS, VOCAB))
    labels_T = torch.randint(VOCAB, (TOKENS,), generator=generator)
    ids_TK = torch.randint(VOCAB, (TOKENS, K), generator=generator)
    ids_TK[::3, 1] = ids_TK[::3, 0]  # an id twice
    ids_TK[1::3, 2] = labels_T[1::3]  # the label itself
    return hidden_TH, weight_VH, labels_T, ids_TK


@pytest.mark.parametrize("chunk_tokens", [1, 8, 1024])
def test_values_and_gradients_are_those_of_a_log_softmax(chunk_tokens):
    hidden_TH, weight_VH, labels_T, ids_TK = problem()
    mix_TK = torch.linspace(-1.0, 2.0, TOKENS * K, dtype=torch.float64).reshape(TOKENS, K)
    found = []
    for naive in (False, True):
        leaves = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
        if naive:
            logprobs_TK = torch.log_softmax(leaves[0] @ leaves[1].T / 0.8, -1).gather(1, ids_TK)
        else:
            logprobs_T, _ = linear_logprob(*leaves, labels_T, temperature=0.8, chunk_tokens=chunk_tokens)
            logprobs_TK = chosen_logprobs(*leaves, labels_T, logprobs_T, ids_TK, temperature=0.8,
                                          chunk_tokens=chunk_tokens)
        (mix_TK * logprobs_TK).sum().backward()
        found.append((logprobs_TK.detach(), leaves[0].grad, leaves[1].grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 5, VOCAB])
def test_the_largest_are_those_of_all_logits_in_order(k):
    hidden_TH, weight_VH, _, _ = problem()
    expected = (hidden_TH @ weight_VH.T).topk(k).indices
    for chunk_tokens in (1, 8, 1024):
        assert torch.equal(largest_ids(hidden_TH, weight_VH, k, chunk_tokens=chunk_tokens), expected)
    assert largest_ids(hidden_TH[:0], weight_VH, k).shape == (0, k)


def test_rounded_logits_of_bfloat16_are_an_engines():
    hidden_TH, weight_VH, labels_T, ids_TK = problem(torch.bfloat16)
    logprobs_T, _ = linear_logprob(hidden_TH, weight_VH, labels_T, rounded=True)
    found = chosen_logprobs(hidden_TH, weight_VH, labels_T, logprobs_T, ids_TK, rounded=True)
    expected = torch.log_softmax((hidden_TH.float() @ weight_VH.float().T).bfloat16().float(), -1).gather(1, ids_TK)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_more_than_the_vocabulary_is_refused():
    hidden_TH, weight_VH, _, _ = problem()
    with pytest.raises(ValueError, match="k=27 must lie between 1 and the vocabulary of 26"):
        largest_ids(hidden_TH, weight_VH, VOCAB + 1)
