"""What a model, a layout and a step need of each GPU, and which layouts to try; arithmetic only, no rank, no GPU.

Letters: T tokens of a micro-batch, h hidden size, t tensor-parallel size, b bytes of an element.
"""

from megatron_rl.plan.fits import check_fits
from megatron_rl.plan.layouts import Hardware, Proposal, estimate, propose
from megatron_rl.plan.memory import MemoryPlan, plan_memory
from megatron_rl.plan.parameters import Chunk, stage_chunks

__all__ = ["Chunk", "Hardware", "MemoryPlan", "Proposal", "check_fits", "estimate", "plan_memory", "propose",
           "stage_chunks"]
