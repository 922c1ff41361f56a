"""Runs programs that a model wrote: isolated by bubblewrap, or without isolation if the user says so."""

from megatron_rl.reward.sandbox.box import Bubblewrap
from megatron_rl.reward.sandbox.limits import Limits, Outcome, out_of_memory
from megatron_rl.reward.sandbox.unsafe import Unsafe

__all__ = ["Bubblewrap", "Limits", "Outcome", "Unsafe", "out_of_memory"]
