"""slime's hooks, as read at commit 624b824: the cut on samples, and our loss inside slime's own loss_function."""

from __future__ import annotations

import importlib
import inspect
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from c3po import C3POLossConfig, c3po_loss, group_advantages

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "c3po_in_slime"
PHI = 11
ARGS = Namespace(
    c3po_phi=PHI, global_batch_size=4, rollout_seed=42, reward_key=None, loss_type="custom_loss",
    custom_loss_function_path="c3po_in_slime.c3po_loss_function", recompute_loss_function=False, allgather_cp=False,
    calculate_per_token_loss=False, context_parallel_size=1, use_rollout_logprobs=False, use_kl_loss=True,
    kl_loss_coef=1e-2, kl_loss_type="low_var_kl", eps_clip=0.2, eps_clip_high=0.28, entropy_coef=1e-2,
    rollout_temperature=1.0, log_probs_chunk_size=-1,
)


@dataclass
class Sample:
    """The fields of slime.utils.types.Sample that the hook reads."""

    index: int
    group_index: int
    response_length: int
    reward: float
    loss_mask: list[int] | None = None
    remove_sample: bool = False

    def get_reward_value(self, args):
        return self.reward


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("c3po_in_slime")
    sys.path.remove(str(FOLDER))


def test_the_hooks_have_the_signatures_that_slime_calls(example):
    assert list(inspect.signature(example.cut_at_phi).parameters) == ["args", "samples"]
    assert list(inspect.signature(example.c3po_loss_function).parameters) == ["args", "batch", "logits",
                                                                             "sum_of_sample_mean"]


def test_every_step_of_a_rollout_is_cut_at_phi_after_whole_group_advantages(example):
    lengths = [5, 4, 6, 3, 7, 2, 5, 9]
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    samples = [Sample(index, index // 2, length, reward)
               for index, (length, reward) in enumerate(zip(lengths, rewards, strict=True))]
    samples[0].loss_mask = [1, 0, 1, 1, 1]  # a tool's answer in the middle
    samples[5].remove_sample = True
    raw, advantages = example.cut_at_phi(ARGS, samples)
    assert raw == rewards
    assert advantages == group_advantages(torch.tensor(rewards).view(4, 2)).flatten().tolist()
    assert [sum(sum(sample.loss_mask) for sample in samples[step:step + 4]) for step in (0, 4)] == [PHI, PHI]
    assert all(len(sample.loss_mask) == sample.response_length for sample in samples)
    assert samples[0].loss_mask[1] == 0 and not any(samples[5].loss_mask)


@pytest.fixture
def slime_loss():
    """slime's loss module with one-rank groups."""
    loss = pytest.importorskip("slime.backends.megatron_utils.loss", exc_type=ImportError,
                               reason="slime is not importable; examples/c3po_in_slime/README.md installs it")
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield loss
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def test_slimes_own_loss_function_gives_c3pos_value(example, slime_loss):
    random = torch.Generator().manual_seed(0)
    prompts, lengths, vocabulary = [2, 3, 1, 2], [4, 2, 5, 3], 13
    tokens = [torch.randint(vocabulary, (p + n,), generator=random) for p, n in zip(prompts, lengths, strict=True)]
    logits = [torch.randn(len(t), vocabulary, generator=random).requires_grad_() for t in tokens]
    noise = [torch.randn(2, n, generator=random) * 0.3 for n in lengths]
    masks = [torch.ones(4), torch.ones(2), torch.tensor([1.0, 1, 1, 0, 0]), torch.zeros(3)]
    advantages = [torch.full((n,), a) for n, a in zip(lengths, [1.0, -1.0, 0.7, 0.2], strict=True)]
    log_softmax = [row.log_softmax(-1)[p - 1:-1] for row, p in zip(logits, prompts, strict=True)]
    new = [row.gather(-1, t[p:, None])[:, 0] for row, t, p in zip(log_softmax, tokens, prompts, strict=True)]
    entropy = [-(row.exp() * row).sum(-1) for row in log_softmax]
    old = [n.detach() + e[0] for n, e in zip(new, noise, strict=True)]
    ref = [n.detach() + e[1] for n, e in zip(new, noise, strict=True)]
    expected, _ = c3po_loss(torch.cat(new), torch.cat(old), torch.cat(advantages), torch.cat(masks).bool(), phi=PHI,
                            config=C3POLossConfig(clip_eps_high=0.28, kl_coef=1e-2, entropy_coef=1e-2),
                            ref_logprobs=torch.cat(ref), entropy=torch.cat(entropy))
    gradients = torch.autograd.grad(expected, logits)

    total = 0.0
    for rows in (slice(0, 3), slice(3, 4)):  # two micro-batches, which slime weighs by their number
        batch = {"unconcat_tokens": tokens[rows], "total_lengths": [len(t) for t in tokens[rows]],
                 "response_lengths": lengths[rows], "loss_masks": masks[rows], "advantages": advantages[rows],
                 "log_probs": old[rows], "ref_log_probs": ref[rows],
                 "rollout_mask_sums": [mask.sum() for mask in masks[rows]]}
        loss, _, report = slime_loss.loss_function(ARGS, batch, 2, ARGS.global_batch_size,
                                                   torch.cat(logits[rows])[None])
        assert "c3po_fill" in report["keys"] and torch.isfinite(report["values"]).all()
        total = total + loss / 2  # Megatron's schedule divides by the number of micro-batches
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for theirs, ours in zip(torch.autograd.grad(total, logits), gradients, strict=True):
        assert torch.allclose(theirs, ours, atol=1e-6)
