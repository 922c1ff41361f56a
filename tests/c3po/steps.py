"""A random step with every input that the losses take, shared by the loss tests."""

from __future__ import annotations

import torch

from c3po import StepTotals, packed_sequence_ids

F64 = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def step(seed=0, lengths=(3, 7, 1, 5)):
    """A packed step: (logprobs, per-token inputs, response lengths at each token). Tokens 3 and 4 are masked.

    A sentence has three tokens or is the rest of its response; the mask leaves one of three in the first of the second.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    old = -torch.rand(tokens, generator=generator, dtype=F64) * 3
    mask = torch.ones(tokens, dtype=torch.bool)
    mask[3:5] = False
    per_token = {
        "old_logprobs": old,
        "advantages": torch.repeat_interleave(torch.randn(len(lengths), generator=generator, dtype=F64),
                                              torch.tensor(lengths)),
        "loss_mask": mask,
        "ref_logprobs": old + 0.3 * torch.randn(tokens, generator=generator, dtype=F64),
        "entropy": torch.rand(tokens, generator=generator, dtype=F64),
        "weights": torch.rand(tokens, generator=generator, dtype=F64) * 2,
        "sentence_ids": sentence_ids(lengths),
    }
    logprobs = old + 0.4 * torch.randn(tokens, generator=generator, dtype=F64)
    lengths_T = torch.repeat_interleave(torch.tensor(lengths), torch.tensor(lengths))
    return logprobs, per_token, lengths_T


def sequence_ids(lengths=(3, 7, 1, 5)):
    return packed_sequence_ids(torch.tensor([0, *lengths]).cumsum(0))


def sentence_ids(lengths=(3, 7, 1, 5), size=3):
    counts = [-(-length // size) for length in lengths]
    return torch.cat([before + torch.arange(length) // size for length, before in
                      zip(lengths, torch.tensor([0, *counts]).cumsum(0), strict=False)])


def totals(mask, lengths=(3, 7, 1, 5)):
    return StepTotals(phi=11, selected_tokens=int(mask.sum()), num_responses=len(lengths), max_response_tokens=9)


def pad(values, lengths=(3, 7, 1, 5), fill=0):
    """[T] -> [B, L], one row per sequence."""
    return torch.nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True, padding_value=fill)


def assert_sums_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(actual[key].sum, expected[key].sum, msg=lambda text, key=key: f"{key}: {text}")
        torch.testing.assert_close(actual[key].count, expected[key].count, msg=lambda text, key=key: f"{key}: {text}")
