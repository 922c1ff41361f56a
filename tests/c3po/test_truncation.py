"""What truncation policies keep, and DAPO's soft over-long penalty at its corners."""

from __future__ import annotations

import pytest
import torch

from c3po import soft_overlong_penalty, truncation_keep_mask

TRUNCATED = torch.tensor([True, False, True])


@pytest.mark.parametrize(("policy", "kept"), [
    ("train", [True, True, True]), ("mask", [False, True, False]), ("overlong_penalty", [True, True, True]),
])
def test_what_each_policy_keeps(policy, kept):
    assert truncation_keep_mask(TRUNCATED, policy).tolist() == kept


def test_golden_soft_overlong_penalty():
    # Limit 100, buffer 20: free up to 80, then -1/20 a token, -1 from 100 on.
    lengths_N = torch.tensor([1, 80, 81, 90, 100, 130])
    actual = soft_overlong_penalty(lengths_N, max_response_tokens=100, buffer_tokens=20)
    torch.testing.assert_close(actual, torch.tensor([0.0, 0.0, -0.05, -0.5, -1.0, -1.0]))


def test_the_buffer_may_be_the_whole_response():
    assert soft_overlong_penalty(torch.tensor([25]), max_response_tokens=100, buffer_tokens=100).tolist() == [-0.25]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="policy='drop'"):
        truncation_keep_mask(TRUNCATED, "drop")
    with pytest.raises(ValueError, match="bool"):
        truncation_keep_mask(torch.tensor([1, 0]), "mask")
    for buffer_tokens in (0, 101):
        with pytest.raises(ValueError, match=f"buffer_tokens={buffer_tokens}"):
            soft_overlong_penalty(torch.ones(1), max_response_tokens=100, buffer_tokens=buffer_tokens)
