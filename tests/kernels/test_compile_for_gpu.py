"""Every kernel compiles for sm_90 and sm_100 in float32 and bfloat16, fits its shared memory, and spills no tile."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SHARED_BYTES = 227 * 1024
SPILLED_BYTES = 64  # per thread; a spilled accumulator is 64 registers and more
KERNELS = {
    "linear_logprob": {"statistics_kernel", "gradient_kernel", "block_gradient_kernel"},
    "pointwise": {"swiglu_kernel", "swiglu_gradient_kernel", "rotation_kernel"},
    "grouped_experts": {"gate_up_kernel", "scatter_kernel", "activation_gradient_kernel", "weight_gradient_kernel"},
    "router_topk": {"forward_kernel", "backward_kernel", "weight_gradient_kernel"},
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["90", "100"])
def test_every_kernel_compiles_within_the_resources_of_a_gpu(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = subprocess.run([sys.executable, "-m", "tests.kernels.compile_for_gpu", capability], check=True,
                            capture_output=True, text=True, env=environment, timeout=600).stdout
    found = json.loads(output)
    names = [f"{op}.{kernel}" for op, kernels in KERNELS.items() for kernel in kernels]
    router = [name for name in names if name.startswith("router_topk")]
    assert set(found) == {f"{name}{'.64' if name in router else ''}.{dtype}" for name in names
                          for dtype in ("bf16", "fp32")} | {f"{name}.256.fp32" for name in router} | {
                              "linear_logprob.statistics_kernel.mixed",  # a NormHead's float32 hidden states
                              "linear_logprob.block_statistics_kernel.fp32"}  # logits are float32
    for name, used in found.items():
        assert used["shared_bytes"] <= SHARED_BYTES, name
        assert used["stack_bytes"] <= SPILLED_BYTES, f"{name} spills registers: {used}"
