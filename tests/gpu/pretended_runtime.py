"""What torch answers on the pretended GPU (pretended.py): torch.cuda, the places of tensors, groups over NCCL."""

from __future__ import annotations

import contextlib
import functools
import os
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.nn.attention.bias import CausalBias
from torch.utils._python_dispatch import _disable_current_modes

from tests.gpu.pretended import NUMPY, claim, claimed, complain, nccl_groups

GPUS = 8
MEMORY_BYTES = 80 << 30
_CPU = torch.device("cpu")


def install() -> None:
    """For the rest of this process. Before the first import of megatron_rl, which looks for a GPU then."""
    _install_cuda()
    _install_places()
    _install_groups()


def current_device() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


# ---- torch.cuda ------------------------------------------------------------------------------------------------

class _Stream:
    """A stream or an event: everything is in order."""

    cuda_stream = 0

    def __init__(self, *args, **kwargs):
        self.device = torch.device("cuda", current_device())

    def _nothing(self, *args, **kwargs):
        pass

    record = wait = wait_event = wait_stream = synchronize = _nothing

    def record_event(self, event=None):
        return event or _Stream()

    def query(self):
        return True

    def is_capturing(self):
        return False

    def elapsed_time(self, other):
        return 0.0

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False


class _Generators(tuple):
    """torch.cuda.default_generators: one for all GPUs, and for the CPU."""

    def __getitem__(self, index):
        return torch.default_generator


def _install_cuda() -> None:
    cuda = torch.cuda
    answers = {
        "is_available": True, "is_initialized": True, "device_count": GPUS, "get_device_name": "pretended GPU",
        "get_device_capability": (9, 0), "mem_get_info": (MEMORY_BYTES, MEMORY_BYTES), "memory_allocated": 0,
        "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0, "memory_stats": {},
        "get_device_properties": SimpleNamespace(major=9, minor=0, total_memory=MEMORY_BYTES, name="pretended GPU",
                                                 multi_processor_count=132),
        "is_current_stream_capturing": False,
        **dict.fromkeys(("_lazy_init", "set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"))}
    for name, value in answers.items():
        setattr(cuda, name, lambda *_, value=value, **__: value)
    cuda.current_device = current_device
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda *_: _Stream()
    cuda.stream = cuda.device = contextlib.nullcontext
    cuda._lazy_call = lambda callback, **_: callback()
    cuda.default_generators = _Generators()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed
    torch.accelerator.current_stream = cuda.current_stream
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, lambda *_, **__: None)


# ---- where tensors lie -----------------------------------------------------------------------------------------

def _install_places() -> None:
    tensor = torch.Tensor
    base = {name: getattr(tensor, name) for name in ("device", "type", "to", "numpy", "__deepcopy__")}

    def on_cuda(self) -> bool:
        return claim(self) == "cuda"

    def moved(self, device: torch.device, dtype: torch.dtype | None = None, copy: bool = False):
        if device.type == (claim(self) or "cpu") and dtype in (None, self.dtype) and not copy:
            return self
        return claimed(base["to"](self, dtype or self.dtype, copy=True), device.type)

    def to(self, *args, copy=False, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            return moved(self, args[0].device, args[0].dtype, copy)
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or memory_format is not None:
            return base["to"](self, *args, copy=copy, **kwargs)
        return moved(self, device, dtype, copy)

    def type_(self, *args, **kwargs):
        answer = base["type"](self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.") if isinstance(answer, str) and on_cuda(self) else answer

    def numpy(self, *args, **kwargs):
        if on_cuda(self):
            complain(NUMPY, f"{self.dtype} {tuple(self.shape)}")
        return base["numpy"](self, *args, **kwargs)

    def deepcopy(self, memo):
        return claimed(base["__deepcopy__"](self, memo), claim(self))

    tensor.device = property(lambda self: torch.device("cuda", current_device()) if on_cuda(self)
                             else base["device"].__get__(self))
    tensor.is_cuda, tensor.is_cpu = property(on_cuda), property(lambda self: not on_cuda(self))
    tensor.get_device = lambda self: current_device() if on_cuda(self) else -1
    tensor.to, tensor.type, tensor.numpy, tensor.__deepcopy__ = to, type_, numpy, deepcopy
    tensor.cuda = lambda self, *_, **__: moved(self, torch.device("cuda"))
    tensor.cpu = lambda self, *_, **__: moved(self, _CPU)
    tensor.pin_memory, tensor.record_stream = lambda self, *_: self, lambda self, *_: None
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _made_on_the_host(getattr(torch, name)))
    CausalBias.__new__ = _causal_bias


def _made_on_the_host(factory):
    """torch.tensor and torch.as_tensor, which pin memory and copy to the device where no mode sees it."""

    @functools.wraps(factory)
    def make(data, *args, device=None, pin_memory=False, **kwargs):
        made = factory(data, *args, **kwargs)
        return made if device is None else made.to(device)

    return make


def _causal_bias(cls, *args, **kwargs):
    """A subclass of Tensor without values, which cannot be made under a mode."""
    with _disable_current_modes():
        return torch.Tensor.__new__(cls)


# ---- groups over NCCL -------------------------------------------------------------------------------------------

def _install_groups() -> None:
    """A group over NCCL runs over gloo, and torch.distributed holds it for one over NCCL."""
    make, device_of = c10d._new_process_group_helper, c10d._get_object_coll_device

    def new_process_group(size, rank, ranks, backend, store, *args, **kwargs):
        if backend != "nccl":
            return make(size, rank, ranks, backend, store, *args, **kwargs)
        made = make(size, rank, ranks, dist.Backend("gloo"), store, *args, **kwargs)
        if made[0] != dist.GroupMember.NON_GROUP_MEMBER:
            nccl_groups.add(made[0])
            c10d._world.pg_map[made[0]] = (dist.Backend("nccl"), store)
        return made

    c10d._new_process_group_helper = new_process_group
    c10d._get_object_coll_device = lambda group=None: "cuda" if (group or dist.group.WORLD) in nccl_groups \
        else device_of(group)
