"""`python -m benchmarks [--gpu] [--quick | --stored] [NAME...]`: each benchmark in its own process, then one table."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys

import torch

from benchmarks.common import BASELINES, format_table, load_rows

BENCHMARKS = ("c3po_step_determinism", "packing", "bare_megatron", "trl_step", "trl_end_to_end", "scaling",
              "linear_logprob", "logprob_memory", "grouped_experts", "router_topk", "weight_sync", "rollout_efficiency",
              "orchestrator_scale", "gateway", "sandbox", "verifiers")
ON_A_GPU = {"floors": [], "ling_lite_slice": ["--trace", "build/trace"],
            "ling_lite_slice_te": ["--trace", "build/trace"]}
"""What --gpu runs (`make bench-gpu`), with arguments."""


def on_a_gpu() -> dict[str, list[str]]:
    """ON_A_GPU, but for what needs Transformer Engine, if it is not installed."""
    if importlib.util.find_spec("transformer_engine") is not None:
        return ON_A_GPU
    print("ling_lite_slice_te: left out, Transformer Engine is not installed (make setup VARIANT=gpu TE=1)",
          file=sys.stderr)
    return {name: arguments for name, arguments in ON_A_GPU.items() if not name.endswith("_te")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="smoke run of each, prints and saves nothing")
    parser.add_argument("--gpu", action="store_true", help=f"those of one GPU: {', '.join(ON_A_GPU)}")
    parser.add_argument("--stored", action="store_true", help="only print what benchmarks/baselines/ holds")
    arguments = parser.parse_args()
    if arguments.gpu and not arguments.stored and not torch.cuda.is_available():
        print("these benchmarks need a CUDA device, and torch sees none", file=sys.stderr)
        return 1
    known = on_a_gpu() if arguments.gpu else dict.fromkeys(BENCHMARKS, [])
    unknown = set(arguments.names) - set(known)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    names = arguments.names or list(known)
    failed = []
    for name in names if not arguments.stored else ():
        command = [sys.executable, "-m", f"benchmarks.{name}", *known[name],
                   *(["--quick"] if arguments.quick else [])]
        if subprocess.run(command).returncode:
            failed.append(name)
    if not arguments.quick:
        rows = [row for name in names for row in load_rows(name)]
        print(f"\nall, from {BASELINES.name}/\n{format_table(rows)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
