"""Undoes Megatron's loss factors in one place, so that a sum over a constant keeps its value.

With calculate_per_token_loss=False and a 3-tuple from the loss function, Megatron 0.19.2
 - divides the loss by max(num_tokens, 1) and by num_microbatches (schedules.forward_step_calc_loss);
 - divides every gradient, experts included, by dp*cp (DistributedDataParallel, gradient_scaling_factor);
 - scales router losses by cp / num_microbatches (MoEAuxLossAutoScaler.set_loss_scale, same function).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossScaling:
    """num_microbatches per rank and the data*context-parallel size of this step."""

    num_microbatches: int
    dp_cp_size: int
    cp_size: int

    def megatron_outputs(self, loss: torch.Tensor, metrics) -> tuple[torch.Tensor, torch.Tensor, object]:
        """The 3-tuple for which Megatron accumulates exactly the gradient of `loss` summed over ranks."""
        one = torch.ones((), dtype=torch.int, device=loss.device)
        return loss * (self.num_microbatches * self.dp_cp_size), one, metrics

    @property
    def router_scale(self) -> float:
        """Factor that a router loss (a sum over this rank's tokens / a constant) needs to survive unchanged."""
        return self.num_microbatches * self.dp_cp_size / self.cp_size
