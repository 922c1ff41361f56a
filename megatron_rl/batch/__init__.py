"""From judged responses to packed micro-batches: assemble (which tokens), schedule (where), pack (the one shift)."""

from megatron_rl.batch.assemble import StepBatch, assemble, step_budget
from megatron_rl.batch.pack import pack
from megatron_rl.batch.schedule import plan_microbatches

__all__ = ["StepBatch", "assemble", "pack", "plan_microbatches", "step_budget"]
