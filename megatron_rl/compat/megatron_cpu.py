"""megatron-core 0.19.2 on a machine without CUDA (CPU tensors, gloo).

`install()` runs before the first `import megatron.core` (compat/__init__.py), `patch_megatron()` after it
(topology.py). With CUDA present neither does anything.
Nothing of Megatron's arithmetic is replaced: only the CUDA runtime calls around it.

Delete when: Megatron-Core asks torch.accelerator instead of torch.cuda for devices, streams and RNG states.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys

import torch

WRITTEN_FOR = "0.19.2"
_CPU = torch.device("cpu")
_FACTORIES = (
    "tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "eye",
    "linspace", "zeros_like", "ones_like", "empty_like", "full_like",
)
_installed = False


class _Stream:
    """A CUDA stream where everything is already in order."""

    device, cuda_stream = _CPU, 0

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, *args):
        pass

    def wait_event(self, *args):
        pass

    def record_event(self, event=None):
        return event or _Event()

    def synchronize(self):
        pass

    def query(self):
        return True

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False


class _Event:
    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        pass

    def wait(self, *args):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


class _DefaultGenerators(tuple):
    """torch.cuda.default_generators[i] for any i."""

    def __getitem__(self, index):
        return torch.default_generator


def _on_cpu(factory):
    """`factory`, with device='cuda' read as the CPU and pinned memory ignored."""

    @functools.wraps(factory)
    def wrapper(*args, **kwargs):
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapper


def _constant(value):
    return lambda *args, **kwargs: value


def install() -> None:
    """Give torch.cuda answers that hold on a CPU. Call before importing megatron.core; a no-op with CUDA."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("import megatron_rl before megatron.core: without CUDA torch must be adapted first "
                           "(compat.megatron_cpu.install)")
    _installed = True
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron's jit_fuser is torch.compile
    _patch_torch_cuda()
    _patch_tensors()


def _patch_torch_cuda() -> None:
    cuda = torch.cuda
    answers = {
        "current_device": _CPU, "set_device": None, "synchronize": None, "empty_cache": None,
        "current_stream": _Stream(), "default_stream": _Stream(), "is_current_stream_capturing": False,
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0,
        "memory_stats": {}, "reset_peak_memory_stats": None, "get_device_capability": (0, 0), "_lazy_init": None,
    }
    for name, value in answers.items():
        setattr(cuda, name, _constant(value))
    cuda.Stream, cuda.Event, cuda.default_generators = _Stream, _Event, _DefaultGenerators()
    cuda.stream = cuda.device = lambda target=None: contextlib.nullcontext(target)
    cuda._lazy_call = lambda callback, **kwargs: callback()
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _constant(None))
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed


def _patch_tensors() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = torch.Tensor.pin_memory = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = lambda self, *args, **kwargs: None
    original_type = torch.Tensor.type

    def type_(self, *args, **kwargs):
        # megatron.core.optimizer compares dtype names such as 'torch.cuda.FloatTensor'
        answer = original_type(self, *args, **kwargs)
        asked_for_name = not args and not kwargs
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if asked_for_name and caller.startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.")
        return answer

    torch.Tensor.type = type_


def patch_megatron() -> None:
    """The same inside megatron.core; call once after importing it and before building a model."""
    if not _installed:
        return
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage())
    # token_dispatcher.maybe_move_tensor_to_cpu skips CPU tensors, but all_to_all_single wants numpy split sizes
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor)
