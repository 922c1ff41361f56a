"""Operations whose memory traffic and launches, not arithmetic, decide the speed of a step.

One folder per operation: reference.py (naive), op.py (what to call), triton_impl.py (kernels), README.md (its costs).
Imports torch, the standard library and, in files named triton_impl, triton.
"""

from rl_kernels.grouped_experts import grouped_experts
from rl_kernels.linear_logprob import linear_logprob
from rl_kernels.pointwise import rotate, weighted_swiglu
from rl_kernels.router_topk import router_topk

__all__ = ["grouped_experts", "linear_logprob", "rotate", "router_topk", "weighted_swiglu"]
