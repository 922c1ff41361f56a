"""optimizer.offload: the optimiser's states live in host memory and visit the device slice by slice, for the step.

The step itself is the device's own: the same AdamW on the same numbers, so weights and moments are bit for bit those
of a run without the key. Between two steps the device holds none of the states; colocated engines may have the memory.
Megatron-Core 0.19.2's HybridDeviceOptimizer is not used: it steps by a CPU's AdamW, which rounds differently, keeps the
float32 weights on the device unless its precision-aware optimiser is on, and has another form of state to checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch

from megatron_rl.config.optimizer import OFFLOAD_SLICE
from megatron_rl.model.adam_state import KINDS, AdamShard, adam_shards, counts_per_parameter


class HostStates:
    """All states of `optimizer`, moved to the host. step() takes the place of optimizer.step_with_ready_grads().

    A state is reached by AdamShard.tensors as before. The optimiser's own float32 weights (below float32 only: in
    float32 they are the network's) are NaN everywhere else, and take no memory.
    """

    def __init__(self, optimizer, parameters: Sequence[torch.nn.Parameter]):
        shards = adam_shards(optimizer, parameters).values()
        self._slices = [_Slice(part) for part in _slices(shards)]
        self._owners = list({id(shard.owner): shard.owner for shard in shards}.values())

    @torch.no_grad()
    def step(self) -> bool:
        """Every slice: to the device, one step of AdamW, new weights into the network, back to the host."""
        for part in self._slices:
            part.step()
        for owner in self._owners:
            if not counts_per_parameter(owner):
                for group in owner.param_groups:
                    group["step"] = group.get("step", 0) + 1  # the slices counted on copies of the group
        if self._slices and self._slices[0].device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # whoever reads the host's copies must find them whole
        return True


def host_buffer(elements: int, *, pinned: bool) -> torch.Tensor:
    """fp32 [elements] of host memory, not initialised."""
    return torch.empty(elements, dtype=torch.float32, device="cpu", pin_memory=pinned)


def _slices(shards: Iterable[AdamShard]) -> Iterator[list[AdamShard]]:
    """Shards in their order, of one optimiser and one kind, up to OFFLOAD_SLICE together."""
    for _, alike in groupby(shards, key=lambda shard: (id(shard.owner), shard.has_own_weight)):
        part, elements = [], 0
        for shard in alike:
            if part and elements + shard.main.numel() > OFFLOAD_SLICE:
                yield part
                part, elements = [], 0
            part.append(shard)
            elements += shard.main.numel()
        yield part


class _Slice:
    """Some shards' states, each kind of them one flat tensor on the host."""

    def __init__(self, shards: Sequence[AdamShard]):
        self._shards, self._owner, self.device = shards, shards[0].owner, shards[0].main.device
        self._kinds = KINDS if shards[0].has_own_weight else KINDS[1:]
        self._sizes = [shard.main.numel() for shard in shards]
        self._shapes = [shard.main.shape for shard in shards]
        self._host = {kind: self._new(kind) for kind in self._kinds}
        self._place(self._host)

    def _new(self, kind: str) -> torch.Tensor:
        flat = host_buffer(sum(self._sizes), pinned=self.device.type == "cuda")
        for part, shard in zip(flat.split(self._sizes), self._shards, strict=True):
            part.copy_(shard.tensors()[kind])
        return flat

    def _place(self, flats: dict[str, torch.Tensor]) -> None:
        """`flats` become the states that AdamW and AdamShard.tensors see."""
        for kind, flat in flats.items():
            for part, shape, shard in zip(flat.split(self._sizes), self._shapes, self._shards, strict=True):
                if kind != "weight":
                    self._owner.state[shard.main][kind] = part.view(shape)
                elif flats is self._host:
                    self._owner.state[shard.main]["host_weight"] = part
                    shard.main.data = shard.main.new_full((), torch.nan).expand(shape)
                else:
                    shard.main.data = part.view(shape)

    def step(self) -> None:
        here = {kind: flat.to(self.device, copy=True, non_blocking=True) for kind, flat in self._host.items()}
        self._place(here)
        mine = {id(shard.main) for shard in self._shards}
        groups = self._owner.param_groups
        self._owner.param_groups = [{**group, "params": [each for each in group["params"] if id(each) in mine]}
                                    for group in groups]
        self._owner.step()
        self._owner.param_groups = groups
        for shard in self._shards if "weight" in here else ():
            shard.parameter.data.view(-1)[shard.start:shard.end].copy_(shard.main.view(-1))
        for kind, flat in here.items():
            self._host[kind].copy_(flat, non_blocking=True)
        self._place(self._host)
