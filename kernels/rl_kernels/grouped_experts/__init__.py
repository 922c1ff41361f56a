"""The routed experts of one MoE layer: gather, two grouped matrix products around a weighted SwiGLU, scatter."""

from rl_kernels.grouped_experts.op import LowRank, grouped_experts, sorted_experts
from rl_kernels.grouped_experts.reference import grouped_experts_reference

__all__ = ["LowRank", "grouped_experts", "grouped_experts_reference", "sorted_experts"]
