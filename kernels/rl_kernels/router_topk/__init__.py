"""The router of one MoE layer: logits in fp32, softmax, top-k, and the sums its losses need, in one pass."""

from rl_kernels.router_topk.op import router_topk
from rl_kernels.router_topk.reference import Routed, router_topk_reference

__all__ = ["Routed", "router_topk", "router_topk_reference"]
