"""The experts that an engine reports per token and layer, narrowed to one byte each."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RoutedLayers:
    """The layers whose experts an engine reports.

    moe_layers: those of its num_layers layers that have experts, from 0.
    """

    num_layers: int
    moe_layers: tuple[int, ...]
    top_k: int
    num_experts: int

    def __post_init__(self):
        if not self.moe_layers:
            raise ValueError("algo.router_replay=rollout: the model has no MoE layer; use algo.router_replay=none")
        if self.num_experts > 256:
            raise ValueError(f"algo.router_replay=rollout sends experts as bytes, and the model has {self.num_experts} "
                             "> 256 experts; use algo.router_replay=trainer or none")

    def decode(self, encoded: str, *, num_tokens: int) -> np.ndarray:
        """uint8 [num_tokens - 1, M, topk] from SGLang's base64 int32 [num_tokens - 1, num_layers, topk].

        ValueError if the data have another shape, or if a token does not have top_k different experts of the model in
        every MoE layer (an entry that the engine never wrote is a row of zeros).
        """
        flat = np.frombuffer(base64.b64decode(encoded), dtype=np.int32)
        expected = (num_tokens - 1, self.num_layers, self.top_k)
        if flat.size != np.prod(expected):
            raise ValueError(f"routed_experts has {flat.size} entries, not {expected} for {num_tokens} tokens")
        experts = flat.reshape(expected)[:, self.moe_layers]
        ordered = np.sort(experts, axis=-1)
        if not ((ordered >= 0) & (ordered < self.num_experts)).all() or (ordered[..., 1:] == ordered[..., :-1]).any():
            raise ValueError(f"routed_experts is not {self.top_k} different experts of {self.num_experts} in every MoE "
                             "layer")
        return np.ascontiguousarray(experts, dtype=np.uint8)
