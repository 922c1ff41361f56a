"""Keys of model.lora: low-rank adapters beside the frozen weights of model.path (model/lora.py)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Literal

from megatron_rl.config.rules import require

PLAIN = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
TARGETS = (*PLAIN, "linear_q_proj", "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj",
           "linear_kv_up_proj")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters train instead of the weights of model.path, which stay as they are (docs/lora.md).

    - rank: rows of an adapter's first matrix. 0: no adapters, all weights train. Every layout takes every rank.
    - alpha: what an adapter adds is multiplied by alpha / rank.
    - targets: the projections that get adapters, under Megatron's names: linear_qkv (query, key and value), linear_proj
      (the attention's output), linear_fc1 (gate and up), linear_fc2 (down). Latent attention has other projections in
      the place of linear_qkv: linear_kv_down_proj and linear_kv_up_proj, and linear_q_proj, or with a latent query
      linear_q_down_proj and linear_q_up_proj. The router never gets one.
    - experts: routed experts have adapters of their own (`own`), or share within a layer the matrices at the hidden
      size, the first of linear_fc1 and the second of linear_fc2 (`shared_outer`), or have none (`none`).
    - path: start from this adapter folder (docs/lora.md) instead of fresh adapters.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = PLAIN
    experts: Literal["own", "shared_outer", "none"] = "own"
    path: str | None = None

    def __post_init__(self):
        require(self.rank >= 0, f"model.lora.rank={self.rank} must not be negative; 0 trains without adapters")
        require(self.alpha > 0, f"model.lora.alpha={self.alpha} must be positive")
        require(len(self.targets) > 0, "model.lora.targets=[] leaves nothing to train; name one of "
                f"{', '.join(TARGETS)}")
        for target in self.targets:
            near = get_close_matches(target, TARGETS, 1)
            require(target in TARGETS, f"model.lora.targets: there is no {target!r}"
                    + (f" (did you mean {near[0]}?)" if near else "") + f"; there are {', '.join(TARGETS)}")
        require(len(set(self.targets)) == len(self.targets), "model.lora.targets names a projection twice")
        require(self.path is None or self.rank > 0,
                f"model.lora.path={self.path} needs model.lora.rank: set it to the rank of that folder")
        idle = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        require(self.rank > 0 or not idle, f"model.lora.{idle[0] if idle else ''} says nothing with model.lora.rank=0, "
                "which trains all weights: set the rank, or leave it out")

    @property
    def on(self) -> bool:
        return self.rank > 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
