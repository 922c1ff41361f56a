"""What a fake tensor cannot know, said instead; each stand-in is put in by a `with` and taken out at its end.

Two kinds: values that only a run knows (how many rows each expert gets, what shape a neighbour sends), and code that
asks whether it runs on a CPU and should do as on a GPU here. Written for torch 2.14.1 and megatron-core 0.19.2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.utils._python_dispatch import _disable_current_modes

from c3po import sequences
from megatron_rl.model import attention, backend, host_states
from megatron_rl.model.kernel_layers import DeviceCounts
from megatron_rl.rehearsal.flops import LENGTHS
from rl_kernels.grouped_experts import op as experts_op
from rl_kernels.linear_logprob import chunked, op, products

DISPATCHER = "megatron/core/transformer/moe/token_dispatcher.py (MoEAlltoAllTokenDispatcher)"
SEQUENCES = "c3po/sequences.py (_num_sequences)"


@contextlib.contextmanager
def replaced(owner, **values) -> Iterator[None]:
    """Attributes of `owner` are `values` inside."""
    before = {name: vars(owner)[name] for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def host_memory(on_host: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Buffers for optimizer.offload are made inside `on_host`: here the device's memory is the CPU's too."""
    original = host_states.host_buffer

    def host_buffer(*args, **kwargs):
        with on_host():
            return original(*args, **kwargs)

    with replaced(host_states, host_buffer=host_buffer):
        yield


class OnHost(torch.Tensor):
    """A real tensor on the host amid fake ones: what is done with it is done for real, and unseen."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with _disable_current_modes():
            return super().__torch_function__(func, types, args, kwargs or {})


def _on_host(values) -> torch.Tensor:
    with _disable_current_modes():
        return torch.tensor(values, dtype=torch.int64).as_subclass(OnHost)


def shares(total: int, parts: int) -> list[int]:
    """`total` in `parts` that differ by at most one, the larger ones first."""
    base, extra = divmod(total, parts)
    return [base + (index < extra) for index in range(parts)]


Imbalance = float | Mapping[int, float]
"""Rows of this rank's experts over the mean; or, by the number of the layer (from 1), rows of its busiest expert over
the mean, which stands on this rank. A run records no load of the layer behind the last (model.mtp), so that layer
gets the load of the last one."""


def rows_with_busiest(total: int, experts: int, own: range, busiest: float) -> list[int]:
    """How many of `total` rows each expert gets: the first of `own` `busiest` times the mean, all others the rest."""
    most = min(total, round(busiest * total / experts))
    others = shares(total - most, experts - 1)
    return [*others[:own.start], most, *others[own.start:]]


def rows_of_experts(total: int, experts: int, own: range, imbalance: float) -> list[int]:
    """How many of `total` rows each expert gets: those of `own` `imbalance` times the mean, the others the rest."""
    if imbalance == 1.0 or len(own) == experts:
        return shares(total, experts)
    here = min(total, round(imbalance * total * len(own) / experts))
    others = shares(total - here, experts - len(own))
    return [*others[:own.start], *shares(here, len(own)), *others[own.start:]]


@contextlib.contextmanager
def known_experts(read_by_host: Callable[[str], None], imbalance: Imbalance = 1.0) -> Iterator[None]:
    """Every rank sends every expert equally many rows, but for what `imbalance` says.

    Router, top-k, permutation and the collective of the counts run as they are; only the counts themselves, which the
    host needs to size the buffers, are said here. read_by_host: told once per dispatch, for the copy to the host that
    Megatron makes of them (_maybe_dtoh_and_synchronize), unless the dispatcher needs none (kernel_layers.DeviceCounts).
    """
    original, original_init = MoEAlltoAllTokenDispatcher.preprocess, MoEAlltoAllTokenDispatcher.__init__
    original_number = BaseMoELayer.set_layer_number

    def set_layer_number(self, layer_number):
        original_number(self, layer_number)
        self.token_dispatcher.rehearsed_layer = layer_number

    def preprocess(self, routing_map):
        on_device = original(self, routing_map)  # and its operations and its collective
        experts, peers = len(self.local_expert_indices), self.ep_size * self.tp_size
        first = self.local_expert_indices[0]
        total, own = routing_map.size(0) * self.config.moe_router_topk, range(first, first + experts)
        if isinstance(imbalance, Mapping):
            busiest = imbalance.get(self.rehearsed_layer, imbalance[max(imbalance)])
            rows = rows_with_busiest(total, self.num_experts, own, busiest)
        else:
            rows = rows_of_experts(total, self.num_experts, own, imbalance)
        mine = rows[first:first + experts]
        if peers > 1:
            self.input_splits = _on_host([sum(rows[start:start + experts])
                                          for start in range(0, self.num_experts, experts)])
            self.output_splits = _on_host([sum(mine)] * self.ep_size)
            self.output_splits_tp = _on_host([sum(mine) * self.ep_size] * self.tp_size)
        if experts > 1:
            self.num_global_tokens_per_local_expert = _on_host([mine] * peers)
        if not isinstance(self, DeviceCounts):
            read_by_host(DISPATCHER)
            return _on_host([count * peers for count in mine])
        if not self.alone:
            read_by_host(DISPATCHER)
        return on_device

    def init(self, *args, **kwargs):
        original_init(self, *args, **kwargs)
        with _disable_current_modes():
            chunks = torch.arange(self.num_experts * self.tp_size)
            self.sort_input_by_local_experts = chunks.reshape(-1, self.num_local_experts).T.ravel().as_subclass(OnHost)
            self.restore_output_by_local_experts = chunks.reshape(self.num_local_experts, -1).T.ravel().as_subclass(
                OnHost)

    with (replaced(MoEAlltoAllTokenDispatcher, preprocess=preprocess, __init__=init),
          replaced(BaseMoELayer, set_layer_number=set_layer_number)):
        yield


def known_sequences(read_by_host: Callable[[str], None], number: int):
    """The host, which reads how many sequences or sentences a micro-batch has, reads `number`."""
    def num_sequences(ids):
        ids.max()
        read_by_host(SEQUENCES)
        return number

    return replaced(sequences, _num_sequences=num_sequences)


def forgotten_loss_scale():
    """MoEAuxLossAutoScaler keeps the scale of the router losses, a tensor, in its class; inside there is none."""
    return replaced(MoEAuxLossAutoScaler, main_loss_backward_scale=None)


def after_a_first_step(chunks: Iterable[torch.nn.Module]) -> None:
    """Megatron's buckets learn in a run's first backward pass when they are complete, and reduce after it; from the
    second on they reduce while it goes on (distributed/param_and_grad_buffer.py: register_grad_ready)."""
    for chunk in chunks:
        for bucket_group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            bucket_group.is_first_batch = False
            bucket_group.golden_per_param_grad_ready_counts = dict.fromkeys(bucket_group.params, 1)


@contextlib.contextmanager
def shapes_of_neighbours(shape: Callable[[], list[int]]) -> Iterator[None]:
    """The shape of what another pipeline stage sends, which stages tell each other as data."""
    original = P2PCommunicator._communicate_shapes

    def communicate(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next):
        original(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next)  # for its messages and host reads
        return tuple(shape() if wanted else [0, 0, 0] for wanted in (recv_prev, recv_next))

    with replaced(P2PCommunicator, _communicate_shapes=communicate):
        yield


@torch.library.custom_op("megatron_rl::fused_rms_norm", mutates_args=())
def fused_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """aten._fused_rms_norm, which torch has for CUDA alone: output and 1/rms, one kernel. Fake tensors only."""
    raise NotImplementedError("fused_rms_norm has no values")


@torch.library.custom_op("megatron_rl::fused_rms_norm_backward", mutates_args=())
def fused_rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor,
                            weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("fused_rms_norm_backward has no values")


@fused_rms_norm.register_fake
def _(x, weight, eps):
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@fused_rms_norm_backward.register_fake
def _(grad, x, rstd, weight):
    return torch.empty_like(x), torch.empty_like(weight)


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1], inputs[1])


def _norm_backward(ctx, grad, _):
    return *fused_rms_norm_backward(grad, *ctx.saved_tensors), None


fused_rms_norm.register_autograd(_norm_backward, setup_context=_save_for_backward)


@torch.library.custom_op("megatron_rl::add_product", mutates_args=("total",))
def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right with 16-bit factors, as torch.addmm(out_dtype=) on CUDA. Fake tensors only."""
    raise NotImplementedError("add_product has no values")


@add_product.register_fake
def _(total, left, right):
    return None


@torch.library.custom_op("megatron_rl::product", mutates_args=())
def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right of 16-bit factors in float32, as torch.mm(out_dtype=) on CUDA. Fake tensors only."""
    raise NotImplementedError("product has no values")


@product.register_fake
def _(left, right):
    return left.new_empty(left.shape[0], right.shape[1], dtype=products.math_dtype(left))


def parts(left: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """rl_kernels' products.parts of a CUDA tensor."""
    if left.dtype == dtype or dtype not in products.NARROW:
        return (left,)
    high = left.to(dtype)
    return high, (left - high).to(dtype)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The backend of a GPU, flash attention without a mask, the fused RMSNorm, the head's products of 16-bit factors
    in blocks of a GPU's size, no look at labels and counts."""
    at_once = attention.attend_at_once

    def attend_at_once(query, key, value, runs, scale):
        LENGTHS[runs.query_offsets], LENGTHS[runs.key_offsets] = runs.query_lengths, runs.key_lengths
        return at_once(query, key, value, runs, scale)

    def attend_to(query, key, value, scale):
        q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)[0]
        return out[0].transpose(0, 1)

    def rms_norm(x, shape, weight, eps):
        return fused_rms_norm(x, weight, eps)[0]

    blocks = chunked.BLOCK_ELEMENTS
    with (replaced(backend, on_gpu=lambda: True),
          replaced(attention, attend_at_once=attend_at_once, attend_to=attend_to), replaced(F, rms_norm=rms_norm),
          replaced(experts_op, _check_sum=lambda *_: None),
          replaced(chunked, BLOCK_ELEMENTS={**blocks, "cpu": blocks["cuda"]}),
          replaced(products, add_product=add_product, product=product, parts=parts),
          replaced(chunked, parts=parts), replaced(op, add_product=add_product, _validate=lambda *_: None)):
        yield


@contextlib.contextmanager
def fake_parameters() -> Iterator[None]:
    """Module.bfloat16 swaps fake parameters, which weak references forbid: here it converts their data."""

    def bfloat16(self):
        for parameter in self.parameters():
            if parameter.is_floating_point() and parameter.dtype is not torch.bfloat16:
                parameter.data = parameter.data.bfloat16()
        for module in self.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.bfloat16()
        return self

    with replaced(torch.nn.Module, bfloat16=bfloat16):
        yield
