"""optimizer: AdamW, its states and the learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_rl.config.rules import require

OFFLOAD_SLICE = 2**26
"""Elements whose states optimizer.offload has on the device at a time, 268 MB of each kind; or one larger shard."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as Megatron runs it, and the learning-rate schedule.

    - lr: the highest learning rate.
    - schedule: after the warm-up the rate stays (`constant`) or falls until the end (`cosine`). min_lr_ratio: `cosine`
      ends at this times lr.
    - warmup_steps: the rate rises to lr over this many optimiser steps. warmup_fraction: or over this share of all
      steps.
    - beta1, beta2: decay of Adam's moments. eps: Adam's. weight_decay: AdamW's.
    - clip_grad: the largest norm of the gradient; 0 does not clip.
    - offload: Adam's moments and the float32 weights live in host memory and visit the GPU slice by slice, for the step
      alone. Weights are bit for bit the same, and checkpoints too. null: only with rollout.engine.colocate.
    """

    lr: float = 3e-6
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    warmup_fraction: float | None = None
    min_lr_ratio: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    offload: bool | None = None

    def __post_init__(self):
        require(self.lr > 0, f"optimizer.lr={self.lr} must be positive")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)} must lie in [0, 1)")
        require(self.eps > 0, f"optimizer.eps={self.eps} must be positive")
        for name in ("warmup_steps", "weight_decay", "clip_grad"):
            require(getattr(self, name) >= 0, f"optimizer.{name}={getattr(self, name)} must not be negative")
        for name in ("min_lr_ratio", "warmup_fraction"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"optimizer.{name}={value} must lie in [0, 1]")
        require(self.warmup_fraction is None or self.warmup_steps == 0,
                "optimizer.warmup_steps and optimizer.warmup_fraction are both set; keep one")
