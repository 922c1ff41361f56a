"""What LossScaling multiplies is what Megatron's own functions divide by. tests/distributed shows it on gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_rl.train_step.loss_scaling import LossScaling

LAYOUTS = [(1, 1, 1), (4, 1, 1), (1, 2, 1), (4, 6, 1), (3, 8, 2)]


def megatron_scales(outputs, scaling: LossScaling) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, factor of router losses) after megatron.core.pipeline_parallel.schedules.forward_step_calc_loss."""
    from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    config = SimpleNamespace(calculate_per_token_loss=False, timers=None, num_moe_experts=4, mtp_num_layers=None,
                             grad_scale_func=None, moe_grad_scale_func=None)
    loss, _ = forward_step_calc_loss(
        torch.nn.Linear(1, 1), torch.zeros(()), lambda _: outputs, config, None, False, scaling.num_microbatches, [],
        cp_group_size=scaling.cp_size, is_last_stage=True)
    return loss, MoEAuxLossAutoScaler.main_loss_backward_scale


@pytest.mark.parametrize(("num_microbatches", "dp_cp_size", "cp_size"), LAYOUTS)
def test_sums_survive_megatrons_factors(num_microbatches, dp_cp_size, cp_size):
    scaling = LossScaling(num_microbatches, dp_cp_size, cp_size)
    outputs = scaling.megatron_outputs(torch.tensor(0.7), {"key": 1})
    assert outputs[2] == {"key": 1}
    loss, router_factor = megatron_scales(outputs, scaling)
    in_ddp = 1.0 / dp_cp_size  # DistributedDataParallel, gradient_scaling_factor
    assert float(loss) * in_ddp == pytest.approx(0.7)
    assert scaling.router_scale * float(router_factor) * in_ddp == pytest.approx(1.0)
