"""What a recorder sees of real ranks over gloo and of the same ranks rehearsed, for test_rehearsal.py:
`python -m tests.distributed.rehearsal_worker FOLDER`.

Forks two ranks for the cases of two and then four for those of four. Each runs one step of its cases under a recorder;
then it leaves the process group and rehearses, of every case, the ranks that fall to it. FOLDER/rank_R_of_W.json has
both.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._C._distributed_c10d import Work

from megatron_rl import topology
from megatron_rl.config.load import build
from megatron_rl.config.schema import Config
from megatron_rl.model import attention
from megatron_rl.model.architectures import parse_config
from megatron_rl.model.families import FAMILIES
from megatron_rl.model.fresh import bailing_config
from megatron_rl.model.network import Network
from megatron_rl.rehearsal.ranks import distinct_ranks
from megatron_rl.rehearsal.recorder import POINT_TO_POINT, Recorder
from megatron_rl.rehearsal.standins import forgotten_loss_scale, host_memory, known_experts, replaced
from megatron_rl.rehearsal.step import Workload, packed, rehearse, run_step
from megatron_rl.rollout.ports import choose_port

TOKENS = 96
COMPARED = ("old log-probabilities", "update", "optimiser step")
"""Not the metrics, which real ranks exchange as Python objects: those are collectives of bytes that a rehearsal answers
without any."""
MODEL = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1,
         "moe_intermediate_size": 32, "first_k_dense_replace": 1}
BFLOAT16 = {"model": {"dtype": "bfloat16"}}
CASES: dict[str, dict] = {
    "dp2": {},
    "plain_ep2": {"parallel": {"ep": 2, "distributed_optimizer": False}},
    "ep2_bf16": {"parallel": {"ep": 2}, **BFLOAT16},
    "ep2_overlap_bf16": {"parallel": {"ep": 2, "overlap": True}, **BFLOAT16},
    "ep2_recompute": {"parallel": {"ep": 2}, "model": {"recompute": "full"}},
    "tp2_ep2_bf16": {"parallel": {"tp": 2, "ep": 2}, **BFLOAT16},
    "tp2_etp2": {"parallel": {"tp": 2, "etp": 2}},
    "tp2_pp2_ep2": {"parallel": {"world_size": 4, "tp": 2, "pp": 2, "ep": 2}},
    "cp2_ep2": {"parallel": {"cp": 2, "ep": 2}},
    "ep2_selective_offload_bf16": {"parallel": {"ep": 2}, "model": {"recompute": "selective", "dtype": "bfloat16"},
                                   "optimizer": {"offload": True}},
    "pp2_recompute_bf16": {"parallel": {"pp": 2}, "model": {"recompute": "full", "dtype": "bfloat16"}},
    "pp2_vpp2": {"parallel": {"pp": 2, "vpp": 2}},
}


def case(name: str) -> tuple[Config, Network, Workload]:
    """Two layers, or as many as there are parts of the pipeline; a pipeline is filled."""
    sections = CASES[name]
    parallel = {"world_size": 2, **sections.get("parallel", {})}
    config = build({**sections, "parallel": parallel, "algo": {"balance_coef": 0.01, "z_loss_coef": 0.01},
                    "batch": {"tokens_per_microbatch": TOKENS, "logprob_chunk_tokens": 64}})
    layers = max(2, config.parallel.pp * (config.parallel.vpp or 1))
    network = parse_config({**bailing_config(**FAMILIES["bailing_moe"].tiny), **MODEL, "num_hidden_layers": layers},
                           "the test's network")
    tokens = TOKENS * config.parallel.cp
    return config, network, Workload((tokens // 2, tokens // 4, tokens // 4), config.parallel.pp)


def attend(query, key, value, scale):
    """attention.attend_to with the mask as a tensor: torch's CausalBias works under no dispatch mode."""
    mask = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device).tril(len(key) - len(query))
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.size(1) != k.size(1))
    return out[0].transpose(0, 1)


def with_mask(config: Config):
    return replaced(attention, attend_to=attend) if config.parallel.cp > 1 else contextlib.nullcontext()


def seen(recorder: Recorder) -> dict[str, dict]:
    """Phase -> FLOPs, peak bytes and calls by operation, group and bytes."""
    found = {phase: {"flops": 0, "peak": recorder.peaks[phase].total, "collectives": Counter()} for phase in COMPARED}
    for each, count in recorder.operations.items():
        if each.phase in found:
            found[each.phase]["flops"] += count * each.flops
    for each, count in recorder.collectives.items():
        if each.phase in found:
            found[each.phase]["collectives"][f"{each.operation} {each.ranks} {each.bytes}"] += count
    return found


class PatientRecorder(Recorder):
    """Waits for a collective at once, and for gloo's threads, which hold its tensors until they come to rest."""

    def _collective(self, func, args, kwargs):
        out = super()._collective(func, args, kwargs)
        if func._overloadpacket.__name__.rstrip("_") not in POINT_TO_POINT:  # which need no thread
            Work.unbox(out[-1] if isinstance(out, tuple) else out).wait()
            wait_for_threads()
        return out


def wait_for_threads() -> None:
    """Returns once no other thread of this process has anything to do. One that waits for the interpreter gets it
    meanwhile, and is seen at the second look."""
    quiet = 0
    while quiet < 2:
        quiet = 0 if any(map(has_work, os.listdir("/proc/self/task"))) else quiet + 1
        time.sleep(0)


def has_work(thread: str) -> bool:
    if int(thread) == threading.get_native_id():
        return False
    with contextlib.suppress(OSError):  # it has ended
        return Path("/proc/self/task", thread, "stat").read_text().rpartition(")")[2].split()[0] in "RD"
    return False


def real(name: str) -> dict[str, dict]:
    config, network, workload = case(name)
    here = topology.start(config.parallel, seed=0)
    recorder = PatientRecorder()
    batches = packed(workload, config, here.cp_rank)
    with (with_mask(config), forgotten_loss_scale(), known_experts(recorder.read_by_host),
          host_memory(recorder.on_host), recorder):
        run_step(config, network, here, batches, recorder)
    topology.stop(keep_processes=True)
    found = seen(recorder)
    gc.collect()
    return found


def rehearsed(name: str, rank: int) -> dict[str, dict]:
    config, network, workload = case(name)
    with with_mask(config):
        found = seen(rehearse(config, network, rank, workload, gpu=False).recorder)
    gc.collect()
    return found


def run_rank(rank: int, world_size: int, folder: Path, port: int) -> None:
    warnings.simplefilter("ignore")
    gc.disable()  # a collection at another moment would be another peak
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    layouts = {name: case(name)[0].parallel for name in CASES}
    names = [name for name, parallel in layouts.items() if parallel.world_size == world_size]
    found = {"real": {name: real(name) for name in names}, "rehearsed": {}}
    topology.stop()
    places = [(name, each) for name in names for each in distinct_ranks(layouts[name])]
    for name, each in places[rank::world_size]:
        found["rehearsed"].setdefault(name, {})[each] = rehearsed(name, each)
    (folder / f"rank_{rank}_of_{world_size}.json").write_text(json.dumps(found))


def main(folder: str) -> None:
    for world_size in (2, 4):
        torch.multiprocessing.start_processes(run_rank, args=(world_size, Path(folder), choose_port(None)),
                                              nprocs=world_size, start_method="fork")


if __name__ == "__main__":
    main(sys.argv[1])
