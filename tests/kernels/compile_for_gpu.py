"""Compiles every kernel of rl_kernels for a GPU that is not there and prints what ptxas made of it, one JSON object.

`python -m tests.kernels.compile_for_gpu [90 | 100]` (the compute capability, by default sm_90) runs the public
operations on CPU tensors of Ling-lite's widths; in place of each launch the kernel is compiled for the very arguments
it got, so results are meaningless. What the interpreter cannot show shows here: types, tile shapes, shared memory,
spilled registers.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from rl_kernels.grouped_experts import grouped_experts
from rl_kernels.linear_logprob import linear_logprob
from rl_kernels.pointwise import rotate, weighted_swiglu
from rl_kernels.router_topk import router_topk

TARGET = GPUTarget("cuda", int(sys.argv[1]) if len(sys.argv) > 1 else 90, 32)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
            torch.bool: "*i1"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
found: dict[str, dict[str, int]] = {}


def compile_instead(kernel: JITFunction, *args, grid, warmup, num_warps=4, num_stages=3, **kwargs):
    """Takes the place of JITFunction.run."""
    values = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[place,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[place,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGET,
                              options={"num_warps": num_warps, "num_stages": num_stages})
    dtype = "bf16" if "*bf16" in signature.values() else "fp32"
    if (signature.get("hidden"), signature.get("weight")) == ("*fp32", "*bf16"):
        dtype = "mixed"
    padded = f".{values['EP']}" if "EP" in values else ""  # the router's tiles depend on the number of experts
    found[f"{kernel.fn.__module__.split('.')[1]}.{kernel.fn.__name__}{padded}.{dtype}"] = {
        "shared_bytes": compiled.metadata.shared, **resources(compiled.asm["cubin"])}


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True,
                              text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack_bytes": int(stack)}


def main() -> None:
    JITFunction.run = compile_instead
    import rl_kernels.triton_impl

    rl_kernels.triton_impl.require_device = lambda tensor, op: None
    for dtype in (torch.bfloat16, torch.float32):
        hidden_TH = torch.zeros(256, 2048, dtype=dtype, requires_grad=True)
        head_VH = torch.zeros(4096, 2048, dtype=dtype, requires_grad=True)
        logprobs_T, entropy_T = linear_logprob(hidden_TH, head_VH, torch.zeros(256, dtype=torch.int64), impl="triton")
        (logprobs_T.sum() + entropy_T.sum()).backward()
        linear_logprob(hidden_TH, head_VH, torch.zeros(256, dtype=torch.int64), impl="triton",
                       column_scale_H=torch.ones(2048))
        logprobs_T, entropy_T = linear_logprob(hidden_TH, head_VH, torch.zeros(256, dtype=torch.int64), impl="fused")
        (logprobs_T.sum() + entropy_T.sum()).backward()

        gate_up_N2F = torch.zeros(256, 2 * 1408, dtype=dtype, requires_grad=True)
        weighted_swiglu(gate_up_N2F, torch.ones(256, 1, requires_grad=True), impl="triton").sum().backward()
        heads_THD = torch.zeros(256, 16, 128, dtype=dtype, requires_grad=True)
        rotate(heads_THD, torch.ones(256, 1, 128), torch.zeros(256, 1, 128), impl="triton").sum().backward()

        gate_up = torch.zeros(4, 2 * 1408, 2048, dtype=dtype, requires_grad=True)
        down = torch.zeros(4, 2048, 1408, dtype=dtype, requires_grad=True)
        weights_TK = torch.ones(256, 2, requires_grad=True)
        indices_TK = torch.zeros(256, 2, dtype=torch.int64)
        grouped_experts(hidden_TH, gate_up, down, indices_TK, weights_TK, impl="triton").sum().backward()

        for experts in (64, 256) if dtype == torch.float32 else (64,):
            router_EH = torch.zeros(experts, 2048, dtype=dtype, requires_grad=True)
            routed = router_topk(hidden_TH, router_EH, 6, impl="triton")
            (routed.weights_TK.sum() + routed.prob_sums_E.sum() + routed.z_sum).backward()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
