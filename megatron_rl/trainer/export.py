"""The policy as a Hugging Face folder, and its adapters as a folder that peft loads."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rl.config.schema import Config
from megatron_rl.model.adapter_folder import write_adapter_folder
from megatron_rl.model.build import Policy
from megatron_rl.model.convert import Exporter
from megatron_rl.model.hf_folder import write_hf_folder
from megatron_rl.topology import Topology


def export(config: Config, exporter: Exporter, here: Topology, folder: Path) -> None:
    """Collective: writes the policy, adapters merged, to `folder`, with the tokenizer of model.path."""
    tensors = exporter()
    if here.is_main:
        raw = json.loads((Path(config.model.path) / "config.json").read_text())
        source = Path(config.model.path)
        write_hf_folder(folder, raw, tensors, tokenizer_from=source, carried_from=source,
                        mtp=config.model.mtp)
    else:
        for _ in tensors:
            pass
    here.barrier()


def export_adapters(config: Config, policy: Policy, here: Topology, folder: Path) -> None:
    """Collective: writes the adapters alone to `folder`; nothing without model.lora."""
    if policy.adapters is None:
        return
    tensors = Exporter(policy, here, adapters=True)()
    if here.is_main:
        write_adapter_folder(folder, config.model, policy.config, tensors)
    else:
        for _ in tensors:
            pass
    here.barrier()
