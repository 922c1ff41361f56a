"""The ranks behind test_transformer_engine.py: every family in every layout, under both backends, on a pretended GPU.

They are forked after the imports and write FOLDER/LAYOUT.NAME.RANK.pt: for each backend the parameters of this rank,
the sums of what came back of the checkpoint, and the training state before and after it went from one backend to the
other through a checkpoint.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import megatron.core.optimizer as megatron_optimizer
import numpy as np
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_layer import TransformerLayer
from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

from megatron_rl import topology
from megatron_rl.batch import pack
from megatron_rl.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from megatron_rl.model.adam_state import KINDS, adam_shards, set_step_count, step_count
from megatron_rl.model.architectures import read_config
from megatron_rl.model.attention import PackedSelfAttention, attend_by_run, packed_sequences
from megatron_rl.model.build import build_policy
from megatron_rl.model.checkpoint import Checkpoints
from megatron_rl.model.convert import Exporter, load_hf, slots
from megatron_rl.model.te_spec import PackedTEAttention
from megatron_rl.rollout.ports import choose_port
from megatron_rl.topology import parallel_state
from megatron_rl.train_step.optimizer import build_optimizer
from megatron_rl.types import TrainSample
from tests.distributed.cases import sha256
from tests.gpu import pretended
from tests.gpu.te_cases import LAYOUTS, RESTORED_IN, TRAVELLERS, networks_in

OTHER = {"torch": "transformer_engine", "transformer_engine": "torch"}
STEPS = 3
MARKS = {"allreduce": True, "sequence_parallel": False, "tensor_model_parallel": False}
"""What Megatron reads of a parameter when it reduces gradients and takes their norm; what it takes if it is not set."""


class Side:
    """Policy, optimiser and checkpoints of one backend. Torch's optimiser beside the torch backend, Transformer
    Engine's beside its own, as Megatron takes it where Transformer Engine is there."""

    def __init__(self, folder: Path, name: str, layout: str, backend: str, here: topology.Topology):
        parallel = ParallelConfig(**LAYOUTS[layout])
        options = ModelConfig(path=str(folder / name), dtype="bfloat16", backend=backend)
        self.folder, self.here = folder, here
        self.policy = build_policy(read_config(folder / name), options, parallel, with_gradients=True)
        load_hf(self.policy, here, folder / name)
        adam = megatron_optimizer.Adam if backend == "transformer_engine" else torch.optim.AdamW
        with patch.multiple(megatron_optimizer, Adam=adam, USING_PYTORCH_OPTIMIZER=adam is torch.optim.AdamW):
            self.optimizer = build_optimizer(self.policy, OptimizerConfig(weight_decay=0.1), parallel)
        self.optimizer.reload_model_params()
        self.owned = slots(self.policy, here)
        self.shards = adam_shards(self.optimizer, [parameter for _, parameter in self.owned])

    def marks(self) -> dict[str, dict[str, Any]]:
        """First Hugging Face name -> what the optimiser and the reductions know of the parameter.

        group: of the ranks that hold a part of its optimiser state; which they are follows the parameters' order.
        """
        groups = {parameter: (group["wd_mult"], group["weight_decay"], group["is_expert_parallel"])
                  for each in self.optimizer.chained_optimizers
                  for group, parameters in zip(each.param_groups, self._model_parameters(each), strict=True)
                  for parameter in parameters}
        known: dict[str, set] = {}
        for part in self.here.gather_objects({slot.key: groups[p] for slot, p in self.owned if p in groups}):
            for key, group in part.items():
                known.setdefault(key, set()).add(group)
        return {slot.key: {"shape": tuple(parameter.shape), "dtype": parameter.dtype, "device": parameter.device.type,
                           "group": known[slot.key],
                           **{mark: getattr(parameter, mark, default) for mark, default in MARKS.items()}}
                for slot, parameter in self.owned}

    @staticmethod
    def _model_parameters(each) -> list[list[torch.nn.Parameter]]:
        found: list[list[torch.nn.Parameter]] = [[] for _ in each.param_groups]
        for parameter, (group, _) in getattr(each, "model_param_group_index_map", {}).items():
            found[group].append(parameter)
        return found

    def exported(self) -> dict[str, str]:
        return {name: sha256(tensor.cpu()) for name, tensor in Exporter(self.policy, self.here)()}

    def train(self, seed: str) -> None:
        """As if it had trained: random master weights and moments, the same on all ranks that hold a copy."""
        for slot, parameter in self.owned:
            if parameter in self.shards:
                shard = self.shards[parameter]
                for kind, tensor in shard.tensors().items():
                    tensor.copy_(self._drawn(slot, parameter, kind + seed)[shard.start:shard.end])
            parameter.data.copy_(self._drawn(slot, parameter, "weight" + seed).view(parameter.shape))
        set_step_count(self.optimizer, STEPS)

    def _drawn(self, slot, parameter, kind: str) -> torch.Tensor:
        rank = 0 if slot.cut == "none" else self.here.tp_rank if slot.over == "tp" else self.here.etp_rank
        seed = zlib.crc32(f"{slot.key} {kind} {rank}".encode())
        return torch.randn(parameter.numel(), generator=torch.Generator().manual_seed(seed))

    def state(self) -> dict[str, Any]:
        """Steps, and the sums of this rank's pieces of weights, master weights and moments by Hugging Face name.

        Data-parallel ranks share out the last three, each backend in another order: they are added up first.
        """
        found: dict[str, Any] = {"steps": step_count(self.optimizer),
                                 "model": {slot.key: sha256(parameter.cpu()) for slot, parameter in self.owned}}
        for kind in KINDS:
            found[kind] = {}
            for over in ("tp", "etp"):
                owned = [(slot.key, parameter) for slot, parameter in self.owned if slot.over == over]
                whole = torch.zeros(sum(parameter.numel() for _, parameter in owned), device=self.here.device)
                pieces = dict(zip(owned, whole.split([parameter.numel() for _, parameter in owned]), strict=True))
                for (_, parameter), piece in pieces.items():
                    if parameter in self.shards:
                        shard = self.shards[parameter]
                        assert not shard.replicated
                        piece[shard.start:shard.end] = shard.tensors()[kind]
                torch.distributed.all_reduce(whole, group=self._copies(over))
                found[kind] |= {key: sha256(piece.cpu()) for (key, _), piece in pieces.items()}
        return found

    @staticmethod
    def _copies(over: str):
        if over == "tp":
            return parallel_state.get_data_parallel_group(with_context_parallel=True)
        return parallel_state.get_expert_data_parallel_group()

    def checkpoints(self, run: Path) -> Checkpoints:
        return Checkpoints(RunConfig(dir=str(run)), self.policy, self.optimizer, self.here)


def build_both(folder: Path, name: str, layout: str, here: topology.Topology) -> dict[str, Any]:
    """Both backends in one layout, and a state that goes from each to the other."""
    found: dict[str, Any] = {}
    sides = {}
    for backend in OTHER:
        side = sides[backend] = Side(folder, name, layout, backend, here)
        found[backend] = {
            "loaded": side.exported(), "marks": side.marks(),
            "layers": [str(layer) for gpt in side.policy.gpt_models for layer in gpt.modules()
                       if isinstance(layer, TransformerLayer)]}
    if name not in TRAVELLERS:
        return found
    if here.pp_rank == 0:
        found["attention"] = attend(sides["transformer_engine"])
    for backend, other in OTHER.items():
        run = folder / f"{layout}.{name}.{backend}"
        if here.is_main:
            run.mkdir()
        here.barrier()
        sides[backend].train(backend)
        found[backend]["before"] = sides[backend].state()
        sides[backend].checkpoints(run).save(STEPS, {})
        found[backend]["after"] = restored(sides[other], run)
    for source in (source for source, target in RESTORED_IN.items() if target == layout):
        for backend, other in OTHER.items():
            run = folder / f"{source}.{name}.{backend}"
            found[backend]["elsewhere"] = {each: restored(sides[each], run) for each in (backend, other)}
    return found


def attend(side: Side) -> dict[str, Any]:
    """What Transformer Engine's own forward hands to its fused kernel for a micro-batch of three sequences and padding.

    The forward looks at its arguments before it chooses a kernel. The choice asks the card, so it is made here, and
    the kernel is `kernel`, which on one rank answers with our attention.
    """
    here, network = side.here, side.policy.config
    (core,) = {id(each): each for gpt in side.policy.gpt_models[:1] for each in gpt.modules()
               if isinstance(each, PackedTEAttention) and each.layer_number == 1}.values()
    samples = [TrainSample(index, np.arange(length, dtype=np.int32), np.arange(length) > 1,
                           np.zeros(length, np.float32), 1.0, length - 2) for index, length in enumerate((7, 12, 5))]
    batch = pack(samples, multiple_of=8, cp_size=here.cp_size, cp_rank=here.cp_rank, device=here.device)
    about = packed_sequences(batch, network, cp_size=here.cp_size, cp_rank=here.cp_rank)
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(batch.num_tokens, heads // here.tp_size, network.head_dim, generator=generator)
                         .bfloat16().to(here.device)
                         for heads in (network.num_attention_heads, *[network.num_key_value_heads] * 2))
    seen: dict[str, Any] = {}

    def kernel(q, k, v, **arguments) -> torch.Tensor:
        seen.update(arguments, q=q, k=k, v=v)
        return attend_by_run(q, k, v, about.runs, core.softmax_scale or network.head_dim ** -0.5).flatten(1) \
            if here.cp_size == 1 else q.flatten(1)

    with (patch.object(dot_product_attention.dpa_utils, "get_attention_backend",
                       lambda _: (False, None, True, 1, False, [])),
          patch.object(core.fused_attention, "forward", kernel)):
        out = core(query, key, value, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=about)
    expected = None
    if here.cp_size == 1:
        ours = PackedSelfAttention(side.policy.transformer, 1, AttnMaskType.causal, "self", attend=attend_by_run)
        expected = bool(torch.equal(out, ours(query, key, value, packed_seq_params=about)))
    tensors = {name: {"shape": tuple(seen[name].shape), "dtype": seen[name].dtype, "device": seen[name].device.type}
               for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_kv")}
    return {"tensors": tensors, "equal": expected, "tokens": batch.num_tokens, "spans": batch.spans,
            "bounds": [seen[name].cpu().tolist() for name in (
                "cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")],
            **{name: seen[name] for name in ("max_seqlen_q", "max_seqlen_kv", "attn_mask_type", "qkv_layout",
                                             "pad_between_seqs", "cp_comm_type")},
            "cp_ranks": None if here.cp_size == 1 else list(seen["cp_global_ranks"]),
            "allowed": [kind for kind in ("FLASH", "FUSED", "UNFUSED") if os.environ[f"NVTE_{kind}_ATTN"] == "1"]}


def restored(side: Side, run: Path) -> dict[str, Any]:
    """The state that a run's checkpoint becomes."""
    side.checkpoints(run).restore(run / "checkpoints" / f"step_{STEPS:08}")
    return side.state()


def run_rank(rank: int, folder: Path, size: int, port: int, layouts: list[str]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    for layout in layouts:
        here = topology.start(ParallelConfig(**LAYOUTS[layout]), seed=0)
        for name in networks_in(layout):
            with pretended.Watch():
                found = build_both(folder, name, layout, here)
            found["findings"] = [str(each) for each in pretended.found]
            torch.save(found, folder / f"{layout}.{name}.{rank}.pt")
        topology.stop(keep_processes=True)
    topology.stop()


def main(folder: str, size: str, *layouts: str) -> None:
    torch.multiprocessing.start_processes(
        run_rank, args=(Path(folder), int(size), choose_port(None), list(layouts)), nprocs=int(size),
        start_method="fork")
