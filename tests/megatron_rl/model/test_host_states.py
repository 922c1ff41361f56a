"""optimizer.offload beside an AdamW that counts its steps per group, as Transformer Engine's and Apex's FusedAdam do.

With torch's AdamW whole runs show it (tests/distributed/test_checkpoint.py).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_rl.model import host_states
from megatron_rl.model.adam_state import adam_shards, set_step_count, step_count

SIZES = (5, 3, 4, 6)


class AdamPerGroup(torch.optim.Optimizer):
    """FusedAdam's counter: one for a group, written down at the group's step; a group without parameters has none."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for each in group["params"]:
                state = self.state[each]
                state["exp_avg"].lerp_(each.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(each.grad**2, 1 - beta2)
                mean = state["exp_avg"] / (1 - beta1 ** group["step"])
                root = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt()
                each -= group["lr"] * mean / (root + group["eps"])


def trained(*, offload: bool, bf16: bool, steps: int, begin: int = 0) -> dict[str, list[torch.Tensor]]:
    """Weights and states after `steps` steps in two groups and an empty one, in slices of at most 8 elements."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=generator).to(
        torch.bfloat16 if bf16 else torch.float32)) for size in SIZES]
    mains = parameters
    if bf16:
        mains = [torch.nn.Parameter(each.detach().float()) for each in parameters]
        for parameter, main in zip(parameters, mains, strict=True):
            parameter.main_param = main
    inner = AdamPerGroup([{"params": mains[:3]}, {"params": mains[3:]}, {"params": []}])
    optimizer = SimpleNamespace(optimizer=inner)
    for shard in adam_shards(optimizer, parameters).values():
        shard.tensors()
    set_step_count(optimizer, begin)
    states = host_states.HostStates(optimizer, parameters) if offload else None
    for _ in range(steps):
        for main in mains:
            main.grad = torch.randn(main.shape, generator=generator)
        if states is not None:
            states.step()
        else:
            inner.step()
            for parameter, main in zip(parameters, mains, strict=True):
                parameter.data.copy_(main.data)
    assert step_count(optimizer) == begin + steps
    shards = adam_shards(optimizer, parameters)
    return {"network": [each.detach() for each in parameters]} | {
        kind: [shards[each].tensors()[kind] for each in parameters] for kind in ("weight", "exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("begin", [0, 7])
def test_a_counter_of_a_group_counts_steps_and_not_slices(bf16, begin, monkeypatch):
    """Also after a resume at step 7."""
    monkeypatch.setattr(host_states, "OFFLOAD_SLICE", 8)
    on_device, on_host = (trained(offload=offload, bf16=bf16, steps=3, begin=begin) for offload in (False, True))
    for kind, tensors in on_device.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, on_host[kind], strict=True)), kind
