"""Sizes, ranks and groups of one run; the only reader of Megatron's parallel_state.

Everything above asks a Topology, never torch.distributed's world or Megatron's globals.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_rl.compat import gloo_device, loopback_store, megatron_cpu
from megatron_rl.compat.own_name import check_own_name
from megatron_rl.config.check import check_gloo
from megatron_rl.config.schema import ParallelConfig

megatron_cpu.patch_megatron()
loopback_store.use_loopback_stores()
gloo_device.share_gloo_device()


TIMEOUT_S = 1800.0
"""How long a rank waits for the others in one collective call."""


@dataclass(frozen=True)
class Topology:
    """Where this process stands. dp_* count ranks that see different sequences; expert_* those of the experts."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    etp_rank: int
    etp_size: int
    expert_dp_rank: int
    device: torch.device
    control_group: Any  # gloo, for Python objects; never on a device
    replica_group: Any  # gloo: the ranks that see this one's sequences; None where it is alone
    replica_firsts: tuple[int, ...]  # the lowest rank of each data-parallel rank

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def tp_group(self):
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def dp_cp_group(self):
        """Ranks over which a step's sums are added: data and context parallel together."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @property
    def tp_dp_cp_group(self):
        """Ranks over which a layer's tokens are spread: tensor (sequence), data and context parallel."""
        return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """`value` of rank `source`, on every rank (pickled over gloo)."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self.control_group)
        return box[0]

    def share_with_replica(self, body: bytes | None) -> bytes:
        """Collective within a replica: every rank of it gets the bytes that its first rank has (over gloo)."""
        if self.replica_group is None:
            return body
        first = self.replica_firsts[self.dp_rank]
        size = torch.tensor([0 if body is None else len(body)])
        dist.broadcast(size, first, group=self.replica_group)
        if self.rank == first:
            content = torch.frombuffer(bytearray(body), dtype=torch.uint8)
        else:
            content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, first, group=self.replica_group)
        return content.numpy().tobytes()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self.control_group)
        return box

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.control_group)

    def sum_over_data(self, tensor: torch.Tensor) -> None:
        """In-place sum over data- and context-parallel ranks."""
        if self.dp_size * self.cp_size > 1:
            dist.all_reduce(tensor, group=self.dp_cp_group)


def start(config: ParallelConfig, *, seed: int, timeout_s: float = TIMEOUT_S) -> Topology:
    """Join the process group, build Megatron's groups and seed its random states.

    It reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them; without them, one process.
    ValueError if the world that was started is not parallel.world_size, or cannot run this layout.
    """
    has_cuda = torch.cuda.is_available()
    if not has_cuda:
        check_gloo(config)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size != config.world_size:
        raise ValueError(f"parallel.world_size={config.world_size}, but {world_size} processes were started")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_cuda else torch.device("cpu")
    if has_cuda:
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"rank {os.environ['RANK']} is number {device.index} on {os.uname().nodename}, which has "
                             f"{torch.cuda.device_count()} GPUs: every rank needs one")
        torch.cuda.set_device(device)
    if not loopback_store.is_loopback(os.environ["MASTER_ADDR"]) and "GLOO_SOCKET_IFNAME" not in os.environ:
        check_own_name()
    timeout = datetime.timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        if world_size == 1 and "MASTER_PORT" not in os.environ:
            dist.init_process_group("nccl" if has_cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1,
                                    timeout=timeout)
        else:
            dist.init_process_group("nccl" if has_cuda else "gloo", timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp, pipeline_model_parallel_size=config.pp,
        virtual_pipeline_model_parallel_size=config.vpp, context_parallel_size=config.cp,
        expert_model_parallel_size=config.ep, expert_tensor_parallel_size=config.etp,
        create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    control_group = dist.new_group(backend="gloo", timeout=timeout)
    replica_group, replica_firsts = _replicas(control_group, timeout)
    return Topology(
        rank=dist.get_rank(), world_size=world_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(), tp_size=config.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(), pp_size=config.pp,
        cp_rank=parallel_state.get_context_parallel_rank(), cp_size=config.cp,
        dp_rank=parallel_state.get_data_parallel_rank(), dp_size=config.dp,
        ep_rank=parallel_state.get_expert_model_parallel_rank(), ep_size=config.ep,
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(), etp_size=config.etp,
        expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
        device=device, control_group=control_group, replica_group=replica_group, replica_firsts=replica_firsts)


def _replicas(control_group: Any, timeout: datetime.timedelta) -> tuple[Any, tuple[int, ...]]:
    """The gloo group of the ranks that share this one's data-parallel rank, and the first of each such group."""
    dp_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(dp_ranks, parallel_state.get_data_parallel_rank(), group=control_group)
    members: dict[int, list[int]] = {}
    for rank, dp_rank in enumerate(dp_ranks):
        members.setdefault(dp_rank, []).append(rank)
    own = None
    for ranks in members.values():  # every rank makes every group, in one order, as torch.distributed asks for
        group = dist.new_group(ranks, backend="gloo", timeout=timeout) if len(ranks) > 1 else None
        own = group if dist.get_rank() in ranks else own
    return own, tuple(members[dp_rank][0] for dp_rank in sorted(members))


def stop(*, keep_processes: bool = False) -> None:
    """Forget Megatron's groups and leave the process group; keep_processes: stay in it, so that start may follow."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized() and not keep_processes:
        dist.destroy_process_group()
