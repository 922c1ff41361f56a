"""`python -m tests.engine.tensor_parallel_loader FOLDER TP`: what each of TP ranks holds after SGLang's own loading.

Prints {parameter: checksum} of every rank as JSON. The ranks are built one after another in this process, without
process groups: SGLang's layers only ask for their rank and the number of ranks while they are built and loaded.
"""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

from megatron_rl.compat import sglang_cpu

sglang_cpu.apply()

from safetensors.torch import load_file  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.managers.mm_utils import tensor_hash  # noqa: E402
from sglang.srt.runtime_context import get_parallel  # noqa: E402
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler  # noqa: E402

from megatron_rl.model.families import FAMILIES  # noqa: E402

SHARED, ALONE = ("tp", "attn_tp", "moe_tp"), ("pp", "moe_ep", "attn_cp", "attn_dp", "moe_dp")


def group(size: int, rank: int) -> SimpleNamespace:
    return SimpleNamespace(world_size=size, rank_in_group=rank, is_first_rank=True, is_last_rank=True,
                           cpu_group=None, device_group=None)


def place(tp: int, rank: int) -> dict:
    sizes = {**dict.fromkeys(SHARED, (tp, rank)), **dict.fromkeys(ALONE, (1, 0))}
    found = {}
    for name, (size, own) in sizes.items():
        found |= {f"{name}_size": size, f"{name}_rank": own, f"{name}_group": group(size, own)}
    del found["attn_dp_group"]  # there is none
    return found


def main(folder: str, tp: str) -> None:
    args = ServerArgs(model_path=folder, device="cpu", dtype="float32", trust_remote_code=True,
                      attention_backend="torch_native", sampling_backend="pytorch")
    set_global_server_args_for_scheduler(args)
    config = ModelConfig.from_server_args(args).hf_config
    family = FAMILIES[config.model_type]
    network = getattr(importlib.import_module(f"sglang.srt.models.{family.engine_modules[0]}"), family.class_name)
    tensors = load_file(f"{folder}/model.safetensors")
    ranks = []
    for rank in range(int(tp)):
        with get_parallel().override(**place(int(tp), rank)):
            model = network(config)
            model.load_weights(iter(tensors.items()))
        ranks.append({name: f"{tensor_hash(parameter.data):016x}" for name, parameter in model.named_parameters()})
    print(json.dumps(ranks))


if __name__ == "__main__":
    main(*sys.argv[1:])
