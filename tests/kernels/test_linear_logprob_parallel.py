"""linear_logprob with the vocabulary split over two real gloo processes equals one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rl_kernels.linear_logprob import chosen_logprobs, largest_ids, linear_logprob

WORLD, TOKENS, HIDDEN, VOCAB = 2, 21, 6, 26
OPTIONS = {"temperature": 0.8, "chunk_tokens": 8}


def problem():
    generator = torch.Generator().manual_seed(3)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    # Rows of one half are far larger, so the ranks' maxima differ and merging them matters.
    weight_VH = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    weight_VH[: VOCAB // 2] *= 6
    labels_T = torch.randint(VOCAB, (TOKENS,), generator=generator)
    labels_T[:2] = torch.tensor([VOCAB // 2 - 1, VOCAB // 2])  # both sides of the border
    labels_T[2::6] = -100
    return hidden_TH, weight_VH, labels_T, torch.linspace(0.5, 1.5, HIDDEN, dtype=torch.float64)


def run(hidden_TH, weight_VH, labels_T, scale_H, group):
    hidden_TH, weight_VH = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    logprobs_T, entropy_T = linear_logprob(hidden_TH, weight_VH, labels_T, column_scale_H=scale_H, group=group,
                                           **OPTIONS)
    mix_T = torch.linspace(-1.0, 2.0, TOKENS, dtype=torch.float64)
    ((mix_T * logprobs_T).sum() + (mix_T.flip(0) * entropy_T).sum()).backward()
    found = {"logprobs": logprobs_T.detach(), "entropy": entropy_T.detach(),
             "grad_hidden": hidden_TH.grad, "grad_weight": weight_VH.grad}
    return found | at_chosen_tokens(hidden_TH.detach(), weight_VH.detach(), labels_T.clamp(min=0), group)


def at_chosen_tokens(hidden_TH, weight_VH, labels_T, group):
    """The same four for the log-probabilities of the five most probable tokens."""
    hidden_TH, weight_VH = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    ids_TK = largest_ids(hidden_TH, weight_VH, 5, group=group, chunk_tokens=8)
    logprobs_T, _ = linear_logprob(hidden_TH, weight_VH, labels_T, group=group, with_entropy=False, **OPTIONS)
    chosen_TK = chosen_logprobs(hidden_TH, weight_VH, labels_T, logprobs_T, ids_TK, group=group, **OPTIONS)
    (torch.linspace(-1.0, 2.0, chosen_TK.numel(), dtype=torch.float64) * chosen_TK.flatten()).sum().backward()
    return {"ids": ids_TK, "chosen": chosen_TK.detach(), "chosen_hidden": hidden_TH.grad,
            "chosen_weight": weight_VH.grad}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    hidden_TH, weight_VH, labels_T, scale_H = problem()
    shard_VH = weight_VH.chunk(WORLD)[rank]
    torch.save(run(hidden_TH, shard_VH, labels_T, scale_H, dist.group.WORLD), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_vocabulary_shards_equal_one_process(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD, join=True)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD)]
    expected = run(*problem(), None)
    tight = {"rtol": 1e-12, "atol": 1e-12}
    for rank in ranks:
        torch.testing.assert_close(rank["logprobs"], expected["logprobs"], **tight)
        torch.testing.assert_close(rank["entropy"], expected["entropy"], **tight)
        torch.testing.assert_close(rank["chosen"], expected["chosen"], **tight)
        assert torch.equal(rank["ids"], expected["ids"])
    for hidden, weight in (("grad_hidden", "grad_weight"), ("chosen_hidden", "chosen_weight")):
        torch.testing.assert_close(torch.cat([rank[weight] for rank in ranks]), expected[weight], **tight)
        # Each rank's gradient of the hidden states is partial; the caller's region adds them.
        torch.testing.assert_close(ranks[0][hidden] + ranks[1][hidden], expected[hidden], **tight)
        assert not torch.allclose(ranks[0][hidden], expected[hidden])
