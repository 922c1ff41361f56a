"""Our grouped expert MLP against Megatron's SequentialMLP: the same sorted rows, parameters and routing weights.

Forward and backward to hidden states, weights and routing weights, float32 on a CPU. The Triton path is not timed
here: its interpreter is for correctness.
"""

from __future__ import annotations

import torch

from benchmarks import moe_layer, workload
from benchmarks.common import Row, interleaved, main, median
from rl_kernels.grouped_experts import sorted_experts


def measure(*, quick: bool, tokens: int, repeats: int) -> tuple[list[Row], dict]:
    config = workload.TINY_MOE if quick else workload.SMALL_MOE | {
        "hidden_size": 512, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 352}
    tokens, repeats = (64, 2) if quick else (tokens, repeats)
    layer, network = moe_layer.build(config)
    experts, top = network.num_experts, network.num_experts_per_tok
    generator = torch.Generator().manual_seed(2)
    counts_E = torch.bincount(torch.randint(experts, (tokens * top,), generator=generator), minlength=experts)
    weights_N = torch.rand(tokens * top, generator=generator).requires_grad_()
    rows_NH = moe_layer.hidden_states(tokens * top, network.hidden_size)
    local = layer.experts.local_experts
    gate_up, down = ([getattr(expert, name).weight for expert in local] for name in ("linear_fc1", "linear_fc2"))

    def megatron() -> torch.Tensor:
        out, _ = layer.experts(rows_NH, counts_E, weights_N)
        out.sum().backward()
        return out

    def ours(impl: str) -> torch.Tensor:
        out = sorted_experts(rows_NH, gate_up, down, counts_E, weights_N, impl=impl)
        out.sum().backward()
        return out

    torch.testing.assert_close(ours("loop"), megatron(), rtol=1e-4, atol=1e-5)
    seconds = interleaved({"megatron": megatron, "loop": lambda: ours("loop"),
                           "grouped_mm": lambda: ours("grouped_mm")}, repeats=repeats)
    size = f"{tokens} tokens, top {top} of {experts}, {network.hidden_size} x {network.moe_intermediate_size}"
    rows = [Row(f"grouped_experts ({impl}) against SequentialMLP: {size}", median(seconds[impl]),
                median(seconds["megatron"]), "s") for impl in ("loop", "grouped_mm")]
    return rows, {"seconds": seconds}


if __name__ == "__main__":
    main("grouped_experts", measure, tokens=2048, repeats=9)
