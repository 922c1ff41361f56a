"""A GPU that is not there: memory of the CPU that claims to lie on cuda:N, and a judge of what is done with it.

pretended_runtime.install() makes torch and Megatron believe in the GPU. `with Watch() as watch:` looks at every
operation as CUDA would, and counts what a GPU would have refused or a GPU run must not do:

- an operation whose tensors lie on two devices;
- a tensor of the CPU in a collective over NCCL, or a CUDA tensor in one over gloo;
- numpy() of a CUDA tensor;
- a CPU adaptation (megatron_rl/compat) that is at work although there is a GPU.

Values are real, so routing that depends on data runs as it would. Not pretended are the kernels themselves, the order
in which streams end, the size of the memory, and NCCL (its groups run over gloo). Written for torch 2.14.1.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

MIXED = "tensors on two devices"
NCCL = "CPU tensor in an NCCL group"
GLOO = "CUDA tensor in a gloo group"
NUMPY = "numpy() of a CUDA tensor"
LEAK = "CPU adaptation at work"
KINDS = (MIXED, NCCL, GLOO, NUMPY, LEAK)

CPU_ADAPTATIONS = ("megatron_rl.compat.megatron_cpu", "megatron_rl.compat.sglang_cpu")
DECIDE = ("install", "patch_megatron", "apply")
"""Functions of these modules that decide whether the others run; all others must not on a GPU."""
LINES_SHOWN = 4
_ROOT = str(Path(__file__).parents[2]) + "/"
_OWN = (str(Path(__file__).with_name("pretended.py")), str(Path(__file__).with_name("pretended_runtime.py")))


@dataclass(frozen=True, order=True)
class Finding:
    """lines: "file.py:12 (function)" of the innermost frames that are neither torch's nor the pretended device's."""

    kind: str
    what: str
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}: {self.what} at {' <- '.join(self.lines)}"


found: Counter[Finding] = Counter()
"""What this process did wrong since it last entered a Watch, and how often. Threads without a Watch add to it too."""
nccl_groups: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
"""Groups that would run over NCCL."""


def complain(kind: str, what: str) -> None:
    lines, frame = [], sys._getframe(1)
    while frame is not None and len(lines) < LINES_SHOWN:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if not (path.startswith("<") or "/torch/" in path or path in _OWN or path.endswith("/contextlib.py")):
            lines.append(f"{path.split('/site-packages/')[-1].removeprefix(_ROOT)}:{frame.f_lineno} ({name})")
        frame = frame.f_back
    found[Finding(kind, what, tuple(lines))] += 1


# ---- where a tensor claims to lie ----------------------------------------------------------------------------

Claim = str | None
"""cuda, cpu, or None for what autograd's engine makes by itself on the memory's real device: that is not judged."""


def claim(tensor: torch.Tensor) -> Claim:
    """The claim is noted on the storage, which a tensor shares with its views."""
    try:
        return vars(tensor.untyped_storage()).get("claim")
    except (NotImplementedError, RuntimeError):  # no storage
        return None


def claimed(tensor: torch.Tensor, value: Claim) -> torch.Tensor:
    with contextlib.suppress(NotImplementedError, RuntimeError):
        tensor.untyped_storage().claim = value
    return tensor


# ---- every operation ------------------------------------------------------------------------------------------

COPIES = ("copy_", "_to_copy", "_foreach_copy_", "_local_scalar_dense", "set_", "is_pinned")
"""Operations that take tensors of two devices, or only look at one."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
"""They take indices of the CPU into a CUDA tensor."""
JOINING = ("cat", "stack")
"""They take no tensor of the CPU without dimensions, as other operations do."""


def _addmm(total, left, right, out_dtype, *, out):
    """torch has a kernel for CUDA alone."""
    return torch.ops.aten.addmm.out(total, left.to(out_dtype), right.to(out_dtype), out=out)


def _mm(left, right, out_dtype):
    """As _addmm."""
    return left.to(out_dtype) @ right.to(out_dtype)


ON_CUDA_ALONE = {torch.ops.aten.addmm.dtype_out: _addmm, torch.ops.aten.mm.dtype: _mm}


class Watch(TorchDispatchMode):
    """Judges the operations of this thread, counts in `found`, and passes claims on from inputs to outputs.

    operations: those on CUDA tensors. collectives: those over NCCL.
    """

    def __enter__(self):
        found.clear()
        self.operations = self.collectives = 0
        _watch_adaptations()
        return super().__enter__()

    @classmethod
    def _should_skip_dynamo(cls):
        """The wrapper against compilation costs time and hides who calls."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        inputs = list(_tensors((*args, *kwargs.values())))
        claims = [claim(each) for each in inputs]
        name = func._schema.name.split("::")[-1]
        self.operations += "cuda" in claims
        if func.namespace == "c10d":
            self.collectives += _judge_collective(name, args, claims)
        elif "cuda" in claims and "cpu" in claims:
            _judge_mixture(name, inputs, claims)
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = asked if asked.type == "meta" else torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        own = OPDEFS.get(func._schema.name)
        if own is not None and "cpu" not in own._backend_fns:  # no CPU's kernel stands in for it
            out = self._within(own._backend_fns[None], args, kwargs)
        else:
            out = ON_CUDA_ALONE.get(func, func)(*args, **kwargs)
        # for zeros of a gradient that is not there autograd's engine asks by itself, on the memory's real device
        by_engine = sys._getframe(1).f_code.co_name == "_engine_run_backward"
        if asked is not None and (asked.type == "cuda" or (name != "_to_copy" and not by_engine)):
            made = asked.type
        else:  # a change of dtype is a _to_copy too; what moves a tensor to the CPU is in pretended_runtime
            made = next((each for each in ("cuda", "cpu") if each in claims), None if by_engine else "cpu")
        for tensor in _tensors((out,)):
            if claim(tensor) is None:
                claimed(tensor, made)
        return out

    def _within(self, function, args, kwargs):
        """What a Python function gives whose own operations are judged too."""
        super().__enter__()
        try:
            return function(*args, **kwargs)
        finally:
            self.__exit__(None, None, None)


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _judge_mixture(name: str, inputs: list[torch.Tensor], claims: list[Claim]) -> None:
    if name in COPIES or (name in INDEXING and claims[0] == "cuda"):
        return
    if any(where == "cpu" and (each.dim() > 0 or name in JOINING)
           for each, where in zip(inputs, claims, strict=True)):
        complain(MIXED, f"{name} of {', '.join(map(str, claims))}")


def _judge_collective(name: str, args: tuple, claims: list[Claim]) -> bool:
    """Whether it runs over NCCL."""
    group = next(each for each in args if isinstance(each, torch.ScriptObject))
    over_nccl = dist.ProcessGroup.unbox(group) in nccl_groups
    if name == "barrier":  # its tensor is made by torch
        return over_nccl
    if over_nccl and "cpu" in claims:
        complain(NCCL, name)
    if not over_nccl and "cuda" in claims:
        complain(GLOO, name)
    return over_nccl


# ---- CPU adaptations -------------------------------------------------------------------------------------------

_TOOL = 3  # sys.monitoring leaves it to anybody


def _watch_adaptations() -> None:
    """Each start of a function of CPU_ADAPTATIONS becomes a finding. No other function becomes slower."""
    monitoring = sys.monitoring
    if monitoring.get_tool(_TOOL) is None:
        monitoring.use_tool_id(_TOOL, "pretended GPU")
        monitoring.register_callback(_TOOL, monitoring.events.PY_START, _adaptation_started)
    for name in CPU_ADAPTATIONS:
        if name in sys.modules:
            for code in _functions(sys.modules[name]):
                if code.co_name not in DECIDE:
                    monitoring.set_local_events(_TOOL, code, monitoring.events.PY_START)


def _adaptation_started(code: types.CodeType, _offset: int) -> None:
    complain(LEAK, code.co_qualname)


def _functions(module: types.ModuleType) -> Iterator[types.CodeType]:
    """The code of all functions of a module, those within functions and classes too."""
    waiting = [vars(module)]
    while waiting:
        for value in waiting.pop().values():
            if inspect.isclass(value) and value.__module__ == module.__name__:
                waiting.append(vars(value))
            elif inspect.isfunction(value) and value.__module__ == module.__name__:
                yield from code_within(value.__code__)


def code_within(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from code_within(value)
