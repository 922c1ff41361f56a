"""Claim: the memory of the log-probability pass goes by the block of logits, not by tokens x vocabulary.

V = 126,464 (Ling-lite). Twice the tokens need hardly more: less than a twentieth of the float32 logits of the tokens
added. All logits at once need many times as much. On a GPU a block is batch.logprob_chunk_tokens rows wide, so that
the chunk sets the memory; on a CPU blocks stay at 4 MB until a chunk passes 1,024 rows (rl_kernels, chunked.py).
Peaks of one call in a process of its own: growth of the resident size on a CPU, of torch's allocator on a GPU; the
gradients that every variant returns are taken off.
"""

from __future__ import annotations

import torch

from benchmarks.common import Row, in_fresh_process, main, peak_growth_bytes
from rl_kernels.linear_logprob import linear_logprob

VOCAB = 126_464


def run(impl: str, backward: bool, chunk_tokens: int, hidden_TH, weight_VH, labels_T) -> None:
    """The pass as train_step/logprobs.py makes it: without entropy where no gradient is wanted."""
    with torch.set_grad_enabled(backward):
        logprobs_T, entropy_T = linear_logprob(hidden_TH, weight_VH, labels_T, chunk_tokens=chunk_tokens,
                                               with_entropy=backward, impl=impl)
    if backward:
        (logprobs_T.sum() + 0.1 * entropy_T.sum()).backward()


def problem(tokens: int, hidden: int, vocab: int, device: str):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(tokens, hidden, generator=generator).to(device, dtype).requires_grad_()
    weight_VH = (torch.randn(vocab, hidden, generator=generator) / hidden**0.5).to(device, dtype).requires_grad_()
    return hidden_TH, weight_VH, torch.randint(vocab, (tokens,), generator=generator).to(device)


def peak_bytes(impl: str, backward: bool, chunk_tokens: int, tokens: int, hidden: int, vocab: int) -> int:
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run(impl, backward, 8, *problem(8, 8, 64, device))  # libraries allocate on their first call
    tensors = problem(tokens, hidden, vocab, device)
    returned = sum(tensor.nbytes for tensor in tensors[:2]) if backward else 0
    if device == "cpu":
        return peak_growth_bytes(lambda: run(impl, backward, chunk_tokens, *tensors)) - returned
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(impl, backward, chunk_tokens, *tensors)
    return torch.cuda.max_memory_allocated() - before - returned


def measure(*, quick: bool, tokens: int, hidden: int, chunk: int) -> tuple[list[Row], dict]:
    """hidden: 2048 is Ling-lite's; the default suits a CPU."""
    tokens, hidden, chunk, vocab = (512, 64, 64, 16_384) if quick else (tokens, hidden, chunk, VOCAB)
    rows, details = [], {}
    for name, backward in (("forward", False), ("forward and backward", True)):
        def peak(impl, chunk_tokens, count, backward=backward):
            return in_fresh_process(peak_bytes, impl, backward, chunk_tokens, count, hidden, vocab) / 2**20

        ours, more_tokens, larger_chunk = (peak("chunked", *each) for each in
                                           ((chunk, tokens), (chunk, 2 * tokens), (2 * chunk, tokens)))
        every = peak("reference", chunk, tokens)
        details[name] = {"chunk_mib": ours, "twice_the_tokens_mib": more_tokens, "twice_the_chunk_mib": larger_chunk,
                         "all_logits_mib": every}
        size = f"{name}, T {tokens}, chunk {chunk}"
        limit = None if quick else 0.05
        rows += [Row(f"logprob_memory: {size}, against all logits", ours, every, "MiB", limit),
                 Row(f"logprob_memory: {size}, added by {tokens} more tokens against their logits", more_tokens - ours,
                     tokens * vocab * 4 / 2**20, "MiB", limit),
                 Row(f"logprob_memory: {size}, with twice the chunk", larger_chunk, ours, "MiB")]
    return rows, details


if __name__ == "__main__":
    main("logprob_memory", measure, tokens=1024, hidden=256, chunk=128)
