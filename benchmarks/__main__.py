"""`python -m benchmarks [--quick | --stored] [NAME...]`: each benchmark in a process of its own, then one table."""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.common import BASELINES, format_table, load_rows

BENCHMARKS = ("c3po_step_determinism", "packing", "bare_megatron", "trl_step", "trl_end_to_end", "scaling",
              "linear_logprob", "logprob_memory", "grouped_experts", "router_topk", "weight_sync", "rollout_efficiency",
              "orchestrator_scale", "gateway", "sandbox", "verifiers")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="smoke run of each, prints and saves nothing")
    parser.add_argument("--stored", action="store_true", help="only print what benchmarks/baselines/ holds")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    names = arguments.names or BENCHMARKS
    failed = []
    for name in names if not arguments.stored else ():
        command = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if arguments.quick else [])]
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
