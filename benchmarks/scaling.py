"""Claim: where the time of a step goes as ranks are added - measured on this machine's cores, simulated on a cluster.

Measured: tokens/s of the same C3PO step on one process, on two data-parallel ones and on two expert-parallel ones, one
thread each. Simulated (a roofline, no measurement): Ring-lite's first RL stage on 8 to 256 H800, from

 - 989 TFLOP/s bfloat16 dense and 3.35 TB/s a GPU (NVIDIA's H100 SXM data sheet; the H800 has the H100's matrix units),
   400 GB/s NVLink (H800; both directions), 8 x 400 Gb/s InfiniBand a node, so 50 GB/s a GPU;
 - the report's batch: 512 prompts x 16 responses of about 12,800 tokens, Phi 409,600 per GPU at 256 GPUs, that is
   all of the batch, at most 24,576 tokens a sequence (arXiv 2506.14731, Sec. 4.3 and Fig. 7a), two optimiser steps;
 - assumed: 40% of the matrix rate in training and scoring, 70% of the bandwidths in decoding and communication, decode
   batches of at most 256 sequences a GPU, one engine per GPU, responses of 12,800 tokens but for one of 24,576 at
   the end of each batch, experts over the 8 GPUs of a node. These are assumptions, not results.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import workload
from benchmarks.common import Row, main, median
from megatron_rl.rollout.ports import choose_port

if TYPE_CHECKING:
    from megatron_rl.model.network import Network

LAYOUTS = {"dp1": {"world_size": 1}, "dp2": {"world_size": 2}, "ep2": {"world_size": 2, "ep": 2}}


# ---- measured -------------------------------------------------------------------------------------------------

def run_rank(rank: int, layout: str, folder: str, port: int, quick: bool, repeats: int) -> None:
    """One rank: `repeats` C3PO steps on the same samples; rank 0 leaves seconds and tokens in LAYOUT.json."""
    options = LAYOUTS[layout]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(options["world_size"]),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    workload.set_environment()
    from megatron_rl import topology
    from megatron_rl.batch import assemble
    from megatron_rl.config.schema import ParallelConfig
    from megatron_rl.observe.timing import Timers
    from megatron_rl.trainer.learner import PolicyLearner

    parallel = ParallelConfig(**options)
    here = topology.start(parallel, seed=0)
    responses, typical, longest = (16, 24, 96) if quick else (64, 100, 1024)
    lengths = workload.response_lengths(responses, median=typical, spread=1.0, longest=longest, seed=0)
    path = Path(folder) / "model"
    config = workload.train_config(path, objective="c3po", phi=int(lengths.sum()), longest=longest,
                                   tokens_per_microbatch=2048, parallel=parallel)
    learner = PolicyLearner(config, here)
    vocab = json.loads((path / "config.json").read_text())["vocab_size"]
    groups = workload.rollout_groups(lengths, responses_per_prompt=8, vocab=vocab, prompt_tokens=(16, 64), seed=0)
    batches = assemble(groups, config.algo, dp=here.dp_size, seed=0, step=0, max_response_tokens=longest)
    seconds = []
    for turn in range(repeats + 1):
        here.barrier()
        started = time.perf_counter()
        learner.learn(workload.shard_of(learner, batches), Timers())
        here.barrier()
        if turn:
            seconds.append(time.perf_counter() - started)
    if here.is_main:
        tokens = sum(len(sample.token_ids) - 1 for sample in batches[0].samples)
        (Path(folder) / f"{layout}.json").write_text(json.dumps({"seconds": seconds, "tokens": tokens}))
    topology.stop()


def run_layout(layout: str, folder: str, quick: bool, repeats: int) -> dict:
    """The ranks of one layout, spawned and waited for."""
    port = choose_port(None)
    torch.multiprocessing.spawn(run_rank, args=(layout, folder, port, quick, repeats),
                                nprocs=LAYOUTS[layout]["world_size"])
    return json.loads((Path(folder) / f"{layout}.json").read_text())


# ---- simulated ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Cluster:
    """Published rates of one GPU and the assumed shares of them that are reached."""

    matrix_flops: float = 989e12
    memory_bytes_per_s: float = 3.35e12
    nvlink_bytes_per_s: float = 200e9
    network_bytes_per_s: float = 50e9
    matrix_share: float = 0.4
    bandwidth_share: float = 0.7
    gpus_per_node: int = 8
    decode_batch: int = 256


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one rollout batch and its optimiser steps."""

    gpus: int
    rollout: float
    tail: float
    logprobs: float
    train: float
    experts: float
    gradients: float
    publish: float

    @property
    def total(self) -> float:
        return sum(value for key, value in asdict(self).items() if key != "gpus")


def simulate(gpus: int, network: Network, cluster: Cluster = Cluster(), *, responses: int = 8192, length: int = 12_800,
             longest: int = 24_576, updates: int = 2) -> StepSeconds:
    """The roofline of one step: rollout with its tail, reference and old log-probabilities, training, communication."""
    from megatron_rl.model.slots import count_parameters
    from megatron_rl.observe.flops import forward_flops

    parameters, active = count_parameters(network)
    weight_bytes = 2.0 * parameters
    chosen = network.num_experts_per_tok / network.num_experts

    def read_bytes(batch: float) -> float:
        """bfloat16 weights that a decoding step of `batch` tokens reads: with many tokens, every expert."""
        touched = 1 - (1 - chosen)**batch
        return 2.0 * (active + (parameters - active) * (touched - chosen) / (1 - chosen))

    bandwidth = cluster.memory_bytes_per_s * cluster.bandwidth_share
    kv_bytes = 2 * 2 * network.num_hidden_layers * network.num_key_value_heads * network.head_dim  # K and V of a token
    per_gpu = responses / gpus
    batch = min(per_gpu, cluster.decode_batch)
    decode_step = (read_bytes(batch) + batch * kv_bytes * length / 2) / bandwidth
    rollout = per_gpu / batch * length * decode_step
    tail = (longest - length) * read_bytes(1) / bandwidth  # the last sequence alone
    flops = forward_flops(asdict(network), [length]) * responses / gpus / (cluster.matrix_flops * cluster.matrix_share)
    tokens = responses * length / gpus
    # dispatch and combine, forward and backward, to the 7 other GPUs of the node; two passes without gradient before
    hops = network.num_experts_per_tok * network.hidden_size * 2 * 2 * (2 + 2) * network.num_hidden_layers
    experts = tokens * hops * 7 / 8 / (cluster.nvlink_bytes_per_s * cluster.bandwidth_share)
    shared_bytes = 4.0 * parameters / cluster.gpus_per_node  # fp32 gradients of this GPU's experts and its share
    nodes = gpus / cluster.gpus_per_node
    gradients = updates * 1.5 * shared_bytes * (nodes - 1) / nodes / (
        cluster.network_bytes_per_s * cluster.bandwidth_share)  # reduce-scatter fp32, all-gather bf16
    publish = weight_bytes / (cluster.network_bytes_per_s * cluster.bandwidth_share)
    return StepSeconds(gpus, rollout, tail, 2 * flops, 3 * flops, experts, gradients, publish)


# ---- the benchmark --------------------------------------------------------------------------------------------

def measure(*, quick: bool, repeats: int) -> tuple[list[Row], dict]:
    from megatron_rl.model.architectures import HF_FILES, parse_config

    repeats = 1 if quick else repeats
    layouts = ("dp1",) if quick else tuple(LAYOUTS)
    with tempfile.TemporaryDirectory() as folder:
        workload.write_model(Path(folder) / "model", workload.TINY_MOE if quick else workload.SMALL_MOE)
        measured = {layout: run_layout(layout, folder, quick, repeats) for layout in layouts}
    rates = {layout: result["tokens"] / median(result["seconds"]) for layout, result in measured.items()}
    rows = [Row(f"scaling: {layout}, {LAYOUTS[layout]['world_size']} processes of one thread", rates[layout],
                None if quick else rates["dp1"], "tokens/s") for layout in layouts]
    path = HF_FILES / "ling_lite.json"
    network = parse_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    simulated = [simulate(gpus, network) for gpus in (8, 16, 32, 64, 128, 256)]
    print("\nsimulated, Ling-lite on H800, seconds of a batch of 8,192 responses (assumptions: the module's docstring)")
    print("  GPUs  rollout    tail  logprobs   train  experts  gradients  publish    total  tokens/s/GPU")
    for step in simulated:
        print(f"{step.gpus:6d} {step.rollout:8.0f} {step.tail:7.0f} {step.logprobs:9.0f} {step.train:7.0f} "
              f"{step.experts:8.0f} {step.gradients:10.1f} {step.publish:8.1f} {step.total:8.0f} "
              f"{8192 * 12_800 / step.total / step.gpus:13.0f}")
    first, last = simulated[0], simulated[-1]
    rows.append(Row("scaling, simulated: efficiency of 256 GPUs against 8", first.total * 8 / (last.total * 256)))
    return rows, {"measured": measured, "simulated": [asdict(step) | {"total": step.total} for step in simulated],
                  "cluster": asdict(Cluster())}


if __name__ == "__main__":
    main("scaling", measure, repeats=5)
