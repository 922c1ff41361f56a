"""Claim: our train step costs at most 5% over Megatron's own forward, backward and optimiser on the same micro-batches.

Both run Megatron's schedule over the same model, optimiser and packed micro-batches. The bare loop takes the
cross-entropy of GPTModel's own output layer, summed over the loss mask and divided by Phi. Ours adds the C3PO loss
with exact entropy, router losses, the step's metrics and their reduction over the ranks.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from benchmarks import workload
from benchmarks.common import Row, interleaved, main, median, median_ratio


def measure(*, quick: bool, repeats: int) -> tuple[list[Row], dict]:
    workload.set_environment()
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_rl import topology
    from megatron_rl.batch import assemble
    from megatron_rl.config.schema import ParallelConfig
    from megatron_rl.model.attention import packed_sequences
    from megatron_rl.trainer.learner import PolicyLearner

    responses, typical, longest, repeats = (8, 24, 96, 2) if quick else (32, 100, 1024, repeats)
    model = workload.TINY_MOE if quick else workload.SMALL_MOE
    here = topology.start(ParallelConfig(), seed=0)
    lengths = workload.response_lengths(responses, median=typical, spread=1.0, longest=longest, seed=0)
    phi = int(lengths.sum())
    with tempfile.TemporaryDirectory() as folder:
        path = workload.write_model(Path(folder) / "model", model)
        config = workload.train_config(path, objective="c3po", phi=phi, longest=longest, tokens_per_microbatch=2048,
                                       parallel=ParallelConfig(), balance_coef=1e-5)
        learner = PolicyLearner(config, here)
    groups = workload.rollout_groups(lengths, responses_per_prompt=8, vocab=model["vocab_size"],
                                     prompt_tokens=(16, 64), seed=0)
    batches = assemble(groups, config.algo, dp=1, seed=0, step=0, max_response_tokens=longest)
    (batch,) = workload.shard_of(learner, batches)
    microbatches, counts = learner._prepare(batch)  # learn() is _prepare, then _update, which is what is timed

    def ours() -> None:
        learner._update(batch, microbatches, counts)

    chunks, optimizer, schedule = learner.policy.chunks, learner.optimizer, get_forward_backward_func()

    def loss_of(microbatch, losses_1T):
        loss = (losses_1T[0] * microbatch.loss_mask).sum() / phi * len(microbatches)
        return loss, {"loss": loss.detach()}

    def forward(iterator, chunk):
        microbatch = next(iterator)
        losses = chunk(microbatch.input_ids[None], microbatch.position_ids[None], None, labels=microbatch.labels[None],
                       packed_seq_params=packed_sequences(microbatch, learner.policy.config))
        return losses, partial(loss_of, microbatch)

    def bare() -> None:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        schedule(forward_step_func=forward, data_iterator=iter(microbatches), model=chunks[0],
                 num_microbatches=len(microbatches), seq_length=max(m.num_tokens for m in microbatches),
                 micro_batch_size=1, forward_only=False)
        optimizer.step()

    seconds = interleaved({"ours": ours, "bare": bare}, repeats=repeats)
    topology.stop()
    ratio = median_ratio(seconds["ours"], seconds["bare"])
    rows = [Row("bare Megatron: seconds of one update", median(seconds["ours"]), median(seconds["bare"]), "s"),
            Row("bare Megatron: median of paired ratios", ratio, None, "", None if quick else 1.05)]
    return rows, {"tokens": sum(m.num_tokens for m in microbatches), "microbatches": len(microbatches),
                  "seconds": seconds}


if __name__ == "__main__":
    main("bare_megatron", measure, repeats=15)
