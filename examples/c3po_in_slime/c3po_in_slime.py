"""C3PO in slime: a reward post-processing that applies the token budget and a loss that divides by Phi.

Written for slime at commit 624b824 (21 August 2026), which loads both by their path. Letters: N responses of a
rollout, T response tokens of a micro-batch.
"""

from __future__ import annotations

from itertools import groupby

import torch

from c3po import C3POLossConfig, c3po_loss, group_advantages, select_within_budget, selection_order


def cut_at_phi(args, samples: list) -> tuple[list[float], list[float]]:
    """--custom-reward-post-process-path: raw rewards and advantages of N samples; writes their loss masks.

    Advantages come from whole groups; then each optimiser step of args.global_batch_size samples, in the order in
    which slime deals them, is cut at args.c3po_phi response tokens (arXiv 2506.14731 Eq. 3).
    """
    rewards = [float(sample.get_reward_value(args)) for sample in samples]
    advantages: list[float] = []
    for _, group in groupby(zip(samples, rewards, strict=True), key=lambda pair: pair[0].group_index):
        advantages += group_advantages(torch.tensor([[reward for _, reward in group]]))[0].tolist()
    for start in range(0, len(samples), args.global_batch_size):
        step = samples[start:start + args.global_batch_size]
        for sample in step:
            dropped = [0] * sample.response_length
            sample.loss_mask = dropped if sample.remove_sample else sample.loss_mask or [1] * sample.response_length
        lengths = torch.tensor([sum(sample.loss_mask) for sample in step])
        order = selection_order(len(step), seed=args.rollout_seed, step=step[0].index)
        kept = select_within_budget(lengths, order, phi=args.c3po_phi).kept_tokens_N
        for sample, tokens in zip(step, kept.tolist(), strict=True):
            mask = torch.tensor(sample.loss_mask)
            sample.loss_mask = (mask * (mask.cumsum(0) <= tokens)).tolist()
    return rewards, advantages


def c3po_loss_function(args, batch: dict, logits: torch.Tensor, sum_of_sample_mean):
    """--custom-loss-function-path with --loss-type custom_loss: (loss, metrics) of a micro-batch, Eq. 2 and 6.

    logits float32 [1, positions, V]; the lists in `batch` hold one tensor per response. slime divides what is returned
    by args.global_batch_size, so the loss is multiplied by it; sum_of_sample_mean, GRPO's divisor, is not used.
    """
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy

    if args.context_parallel_size > 1 or args.calculate_per_token_loss:
        raise ValueError("C3PO in slime needs --context-parallel-size 1 and no --calculate-per-token-loss")
    _, new = get_log_probs_and_entropy(logits, args=args, unconcat_tokens=batch["unconcat_tokens"], with_entropy=True,
                                       total_lengths=batch["total_lengths"], response_lengths=batch["response_lengths"])
    old, kl_coef = batch["rollout_log_probs" if args.use_rollout_logprobs else "log_probs"], 0.0
    if args.use_kl_loss:
        kl_coef = args.kl_loss_coef
    config = C3POLossConfig(clip_eps_low=args.eps_clip, clip_eps_high=args.eps_clip_high, kl_coef=kl_coef,
                            kl_estimator={"low_var_kl": "k3"}.get(args.kl_loss_type, args.kl_loss_type),
                            entropy_coef=args.entropy_coef)
    loss, sums = c3po_loss(torch.cat(new["log_probs"]), torch.cat(old), torch.cat(batch["advantages"]),
                           torch.cat(batch["loss_masks"]).bool(), phi=args.c3po_phi, config=config,
                           ref_logprobs=torch.cat(batch["ref_log_probs"]) if args.use_kl_loss else None,
                           entropy=torch.cat(new["entropy"]))
    per_step = args.global_batch_size
    reported = {"loss": loss.detach() * per_step, "c3po_fill": sums["selected_tokens"].sum * per_step / args.c3po_phi}
    for name in ("policy_loss", "kl", "entropy", "clip_low_fraction", "clip_high_fraction", "approx_kl"):
        reported[name] = sums[name].sum * per_step / args.c3po_phi
    return loss * per_step, reported
