"""From judged responses to packed micro-batches: assemble (which tokens), schedule (where), pack (the one shift)."""

from megatron_rl.batch.assemble import StepBatch, UnfillableStep, assemble
from megatron_rl.batch.fill import BudgetFill, FillCount
from megatron_rl.batch.hooks import check_hooks, own_function
from megatron_rl.batch.pack import by_sample, lay_out, pack, packed_tokens
from megatron_rl.batch.schedule import common_tokens, plan_microbatches
from megatron_rl.batch.sentences import with_sentences

__all__ = [
    "BudgetFill", "FillCount", "StepBatch", "UnfillableStep", "assemble", "by_sample", "check_hooks",
    "common_tokens", "lay_out", "own_function", "pack", "packed_tokens", "plan_microbatches", "with_sentences",
]
