"""Our hashes of parameters are SGLang's: its own kernel runs in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from megatron_rl.sync.engine_hashes import TILE, CPUHash, GPUHash

SIZES = (0, 1, 3, 255, 2 * TILE, 2 * TILE + 1, 5 * TILE + 77)
"""bfloat16 elements: nothing, less than a word, whole tiles and parts of them."""

SGLANGS = """
import importlib.util, json, sys
import torch
spec = importlib.util.find_spec("sglang").submodule_search_locations[0]
found = importlib.util.spec_from_file_location("hashes", spec + "/kernels/ops/memory/gpu_tensor_hash.py")
module = importlib.util.module_from_spec(found)
found.loader.exec_module(module)

class OnGPU(torch.Tensor):
    is_cuda = True  # which it asks for

def words(tensor):
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    return torch.nn.functional.pad(data, (0, -len(data) % 4)).view(torch.uint32)

module._as_uint32_words = words
print(json.dumps([f"{module.gpu_tensor_hash(tensor.as_subclass(OnGPU)):016x}" for tensor in torch.load(sys.argv[1])]))
"""


def parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).bfloat16() for size in SIZES]


def in_parts(kind: type, tensor: torch.Tensor) -> str:
    """Three uneven parts. The first ends within a word."""
    made, cut = kind(), len(tensor) // 3
    for part in tensor.split([cut, cut, len(tensor) - 2 * cut]):
        made.update(part)
    return made.hexdigest()


def test_the_hash_of_a_gpu_is_that_of_sglangs_kernel(tmp_path):
    torch.save(parameters(), tmp_path / "parameters.pt")
    done = subprocess.run([sys.executable, "-c", SGLANGS, str(tmp_path / "parameters.pt")], capture_output=True,
                          text=True, timeout=300, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert [in_parts(GPUHash, each) for each in parameters()] == json.loads(done.stdout.splitlines()[-1])


def test_a_hash_sees_every_element_and_its_place():
    for kind in (CPUHash, GPUHash):
        plain, other = parameters()[-1], parameters()[-1]
        other[TILE + 5] += 1
        swapped = torch.cat([plain[-2:], plain[2:-2], plain[:2]])
        assert len({in_parts(kind, each) for each in (plain, other, swapped, plain[:-1])}) == 4
