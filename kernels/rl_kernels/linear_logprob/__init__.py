"""Log-probability of a label and exact entropy, straight from hidden states, without holding [T, V] logits."""

from rl_kernels.linear_logprob.chosen import chosen_logprobs, largest_ids
from rl_kernels.linear_logprob.op import Implementation, linear_logprob
from rl_kernels.linear_logprob.reference import linear_logprob_reference

__all__ = ["Implementation", "chosen_logprobs", "largest_ids", "linear_logprob", "linear_logprob_reference"]
