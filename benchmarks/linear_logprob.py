"""Claim: log-probabilities and entropy without [T, V] logits take no longer than with them, in a tenth of the memory.

Forward and backward of a loss on both outputs, V = 126,464 (Ling-lite). Memory is the growth of the peak resident
size, in a fresh process each, beyond the gradients that both return.
"""

from __future__ import annotations

import torch

from benchmarks.common import Row, in_fresh_process, interleaved, main, median, median_ratio, peak_growth_bytes
from rl_kernels.linear_logprob import linear_logprob

VOCAB = 126_464


def problem(tokens: int, hidden: int, vocab: int):
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    weight_VH = (torch.randn(vocab, hidden, generator=generator) / hidden**0.5).requires_grad_()
    return hidden_TH, weight_VH, torch.randint(vocab, (tokens,), generator=generator)


def step(impl: str, hidden_TH, weight_VH, labels_T) -> None:
    hidden_TH.grad = weight_VH.grad = None
    logprobs_T, entropy_T = linear_logprob(hidden_TH, weight_VH, labels_T, impl=impl)
    (logprobs_T.sum() + 0.1 * entropy_T.sum()).backward()


def memory(impl: str, tokens: int, hidden: int, vocab: int) -> int:
    torch.set_num_threads(1)
    step(impl, *problem(8, 8, 64))  # libraries allocate on their first call
    tensors = problem(tokens, hidden, vocab)
    return peak_growth_bytes(lambda: step(impl, *tensors)) - 4 * hidden * (tokens + vocab)


def measure(*, quick: bool, tokens: int, hidden: int, repeats: int) -> tuple[list[Row], dict]:
    torch.set_num_threads(1)
    tokens, hidden, vocab, repeats = (256, 64, 8192, 2) if quick else (tokens, hidden, VOCAB, repeats)
    tensors = problem(tokens, hidden, vocab)
    seconds = interleaved({impl: lambda impl=impl: step(impl, *tensors) for impl in ("chunked", "reference")},
                          repeats=repeats)
    peak = {impl: in_fresh_process(memory, impl, tokens, hidden, vocab) for impl in seconds}
    size = f"T {tokens}, H {hidden}, V {vocab}"
    rows = [Row(f"linear_logprob: seconds, {size}", median(seconds["chunked"]), median(seconds["reference"]), "s"),
            Row(f"linear_logprob: median of paired ratios, {size}",
                median_ratio(seconds["chunked"], seconds["reference"]), None, "", None if quick else 1.0),
            Row(f"linear_logprob: peak memory, {size}", peak["chunked"] / 2**20, peak["reference"] / 2**20, "MiB",
                None if quick else 0.1)]
    return rows, {"seconds": seconds, "peak_bytes": peak}


if __name__ == "__main__":
    main("linear_logprob", measure, tokens=1024, hidden=256, repeats=5)
