"""Hugging Face -> Megatron in a layout -> Hugging Face: every tensor's sha256 compared, or an adapter folder merged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_rl import topology
from megatron_rl.config.schema import Config
from megatron_rl.model.adapter_folder import starting_adapters
from megatron_rl.model.architectures import read_config
from megatron_rl.model.build import build_policy
from megatron_rl.model.convert import Exporter, fill_adapters, load_hf
from megatron_rl.model.hf_folder import HFReader
from megatron_rl.model.slots import carried, expected_shapes
from megatron_rl.trainer.export import export


def run(config: Config) -> None:
    """Load model.path on parallel.* ranks, write <run.dir>/hf, and raise ValueError unless it is equal bit for bit.

    With the adapter folder model.lora.path the folder holds W + BA instead, and nothing is compared.
    """
    here = topology.start(config.parallel, seed=config.run.seed)
    policy = build_policy(read_config(config.model.path), config.model, config.parallel, with_gradients=False)
    load_hf(policy, here, config.model.path)
    merges = config.model.lora.path is not None
    if merges:
        fill_adapters(policy, here, starting_adapters(config.model, policy.config, config.run.seed))
    target = Path(config.run.dir) / "hf"
    export(config, Exporter(policy, here), here, target)
    if here.is_main and not merges:
        source = HFReader(config.model.path)
        held = expected_shapes(policy.config, mtp=config.model.mtp)
        compare(source, HFReader(target), [*held, *carried(policy.config, source.names, mtp=config.model.mtp)])
    topology.stop()


def compare(source: HFReader, written: HFReader, names: Iterable[str]) -> None:
    different = [name for name in names if digest(source.get(name)) != digest(written.get(name))]
    if different:
        raise ValueError(f"{len(different)} tensors changed on the way, the first is {different[0]} "
                         "(is model.dtype the checkpoint's own?)")


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
