"""`megatron-rl COMMAND [key=value ...]`: one command per recipe; every key of conf/ can be set on the line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

SHELLS = ("bash", "zsh")
LAUNCHERS = ("basic", "submitit_slurm")
EPILOG = """\
examples:
  megatron-rl quickstart                                      a small MoE from nothing to C3PO, with a report
  megatron-rl rl experiment=quickstart c3po.phi=2048          choose an experiment, change single keys
  megatron-rl rl experiment=quickstart resume=true            go on from the last checkpoint
  megatron-rl rl --check experiment=ring_lite_rl_stage1          resolve and validate for 256 GPUs, start nothing
  megatron-rl plan experiment=ring_lite_rl_stage1 --gpu-memory 80   what it needs of each GPU, and which layouts fit
  megatron-rl rl model.path=HF_FOLDER data.path=problems.jsonl data.answer_key=solution run.dir=runs/mine
  megatron-rl pipeline experiment=ring_lite_tiny              SFT -> choice by entropy -> two RL stages -> general SFT
  megatron-rl evaluate experiment=quickstart model.path=runs/quickstart/rl/hf
  megatron-rl ablate fig7_8_c3po_vs_grpo scale=tiny           a figure of the paper: arms x seeds, table, verdicts
  megatron-rl report runs/quickstart/rl
  megatron-rl config diff runs/quickstart/rl 'experiment=quickstart'
  megatron-rl slurm experiment=ring_lite_rl_stage1 slurm.partition=gpu slurm.nodes=32 slurm.gpus_per_node=8 --dry-run
keys: docs/configuration.md; groups (experiment=, parallel=, algo=): the folders under conf/
"""

PIPELINE_EPILOG = """\
examples:
  megatron-rl pipeline experiment=ring_lite_tiny                        every stage with a tiny random model, minutes
  megatron-rl pipeline experiment=ring_lite_tiny                        again after Ctrl-C or a kill: goes on there
  megatron-rl pipeline experiment=ring_lite_tiny run.dir=runs/mine run.seed=1     another one beside it
  megatron-rl pipeline experiment=ring_lite_tiny run.dir=runs/mine math_rl.run.steps=80     a key of one stage
  megatron-rl pipeline experiment=ring_lite_tiny run.dir=runs/mine model.path=HF_FOLDER     your own base checkpoint
  megatron-rl pipeline experiment=ring_lite --check                     the paper's scale: validate every stage
stages, their folders, records and the report: docs/pipeline.md
"""

COMMANDS = {
    "quickstart": "the whole story on this machine: random model -> SFT -> C3PO RL -> report",
    "rl": "C3PO reinforcement learning: starts an SGLang engine and torchrun, stops both",
    "sft": "supervised fine-tuning, same Megatron step",
    "pipeline": "every stage of the report in one command, from SFT and the choice by entropy to RL; resumable",
    "plan": "memory of each GPU by kind, and layouts that fit; needs no GPU and no checkpoint",
    "evaluate": "held-out accuracy and benchmarks of a checkpoint, through an engine",
    "select-checkpoint": "which epoch of an SFT run RL should start from, by its entropy on the RL prompts",
}


DATA_STEPS = {
    "clean": "rules: multiple choice, true or false, images, several parts, proofs, no answer, bad characters",
    "dedup": "exact and near-duplicates (MinHash)",
    "decontaminate": "problems that share n-grams with benchmark files",
    "verify": "reference answers that the verifier cannot judge, or that worked responses or a model contradict",
    "difficulty": "pass rate of a served model; always and never solved problems go",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="megatron-rl", description=__doc__, epilog=EPILOG,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        epilog = PIPELINE_EPILOG if name == "pipeline" else EPILOG
        command = commands.add_parser(name, help=text, description=text, epilog=epilog,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides, e.g. c3po.phi=4096")
        if name in ("rl", "sft", "pipeline"):
            command.add_argument("--check", action="store_true",
                                 help="validate, print the resolved layout, start nothing")
        if name == "plan":
            command.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="of one GPU (default 80)")
            command.add_argument("--colocated", action="store_true",
                                 help="the engine takes rollout.engine.mem_fraction_static of the same GPUs")
    add_data(commands)
    convert = commands.add_parser("convert", help="make checkpoints: upcycle a dense model, fetch SmolLM2, round trip")
    kinds = convert.add_subparsers(dest="kind", required=True, metavar="KIND")
    upcycle = kinds.add_parser("upcycle", help="dense Llama or Qwen2 folder -> BailingMoe folder with equal logits")
    upcycle.add_argument("source")
    upcycle.add_argument("target")
    upcycle.add_argument("--experts", type=int, default=8)
    upcycle.add_argument("--experts-per-token", type=int, default=2)
    smollm2 = kinds.add_parser("smollm2", help="SmolLM2-135M from its package, upcycled")
    smollm2.add_argument("target")
    roundtrip = kinds.add_parser("roundtrip", help="HF -> Megatron -> HF, sha256 compared: model.path=... parallel=...")
    roundtrip.add_argument("overrides", nargs="*", metavar="key=value")
    config = commands.add_parser("config", help="what a configuration resolves to, and where two differ")
    views = config.add_subparsers(dest="view", required=True, metavar="VIEW")
    show = views.add_parser("show", help="every key with its value, as YAML")
    show.add_argument("overrides", nargs="*", metavar="key=value")
    diff = views.add_parser("diff", help="the keys in which two configurations differ",
                            description="LEFT and RIGHT: a run's folder, a config.json, or overrides in quotes.")
    diff.add_argument("left", metavar="LEFT")
    diff.add_argument("right", metavar="RIGHT", nargs="?", default="defaults", help="default: the schema's defaults")
    slurm = commands.add_parser("slurm", help="submit an RL run to Slurm: trainers and engines in one job",
                                description="Submits `megatron-rl rl` with the same overrides; section slurm of the "
                                "configuration describes the job. Before its time limit it saves and is requeued.")
    slurm.add_argument("overrides", nargs="*", metavar="key=value")
    slurm.add_argument("--dry-run", action="store_true", help="print the batch script, submit nothing")
    ablate = commands.add_parser("ablate", help="an ablation of examples/: arms x seeds, table, figure, verdicts",
                                 description="Runs what is not finished yet, then writes the result. Settings: "
                                 "scale=tiny|paper, seeds=0,1,2, arms=A,B, out=FOLDER, start=CHECKPOINT for every "
                                 "arm, and any key of the configuration, for every arm.")
    ablate.add_argument("name", metavar="EXAMPLE")
    ablate.add_argument("settings", nargs="*", metavar="key=value")
    ablate.add_argument("--check", action="store_true", help="compose and validate every run, start nothing")
    ablate.add_argument("--slurm", action="store_true", help="submit a job per run instead (then --collect)")
    ablate.add_argument("--multirun", choices=LAUNCHERS, help="as a Hydra multirun: one job for each arm and seed, by "
                        "this launcher (submitit_slurm: on Slurm, one node each), then the result")
    ablate.add_argument("--collect", action="store_true", help="run nothing, write the result of what is finished")
    ablate.add_argument("--readme", action="store_true", help="put the result into the example's README")
    replay = commands.add_parser("replay-step", help="run a dumped optimiser step again and show where it stops being "
                                 "finite (<run.dir>/dumps/step_...)")
    replay.add_argument("folder", metavar="DUMP")
    report = commands.add_parser("report", help="one HTML file with the plots of one or more runs")
    report.add_argument("runs", nargs="+", metavar="RUN_DIR")
    report.add_argument("--out", default=None, help="file to write (default: report.html in the run, or "
                        "comparison.html in the first of several)")
    commands.add_parser("doctor", help="what this machine has and lacks")
    completion = commands.add_parser("completion", help="shell completion: source <(megatron-rl completion bash)")
    completion.add_argument("shell", choices=SHELLS)
    return top


def add_data(commands) -> None:
    data = commands.add_parser("data", help="curation of a problem file: what stays, what goes and why (docs/data.md)")
    steps = data.add_subparsers(dest="step", required=True, metavar="STEP")
    for name, text in DATA_STEPS.items():
        step = steps.add_parser(name, help=text, description=text)
        step.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.path=problems.jsonl")
        step.add_argument("--out", required=True, metavar="DIR", help="for kept.jsonl, removed.jsonl and report.json")
        if name == "dedup":
            step.add_argument("--threshold", type=float, default=0.7, help="similarity (default 0.7)")
            step.add_argument("--ignore-numbers", action="store_true",
                              help="near-duplicates may differ in their numbers")
        if name == "decontaminate":
            step.add_argument("--against", action="append", required=True, metavar="KIND:FILE",
                              help="a benchmark (jsonl:, parquet:, aime:, gpqa:, livecodebench:); may be repeated")
            step.add_argument("--ngram", type=int, default=10, help="words that make one match (default 10)")
            step.add_argument("--share", type=float, default=0.5,
                              help="of the shorter text's n-grams that must match (default 0.5)")
        if name == "verify":
            step.add_argument("--samples", type=int, default=0, help="also ask a model so often (default 0: do not)")
            step.add_argument("--agreement", type=float, default=0.5,
                              help="share of samples with one other answer that removes (default 0.5)")
        if name == "difficulty":
            step.add_argument("--samples", type=int, default=8, help="responses to each problem (default 8)")
            step.add_argument("--keep-always-solved", action="store_true")
            step.add_argument("--keep-never-solved", action="store_true", help="for a stronger model to try")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """SystemExit with the usage when a word is not understood. key=value and options may come in any order."""
    options, more = parser().parse_known_args(arguments)
    if more:  # argparse takes positional arguments before the first option, or after it, but not both
        pairs = next((getattr(options, name) for name in ("overrides", "settings") if hasattr(options, name)), None)
        if pairs is None or any(text.startswith("-") or "=" not in text for text in more):
            parser().error(f"unrecognized arguments: {' '.join(more)}")
        pairs += more
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 the run failed, 2 the input is wrong, 130 interrupted."""
    options = parse(arguments)
    from megatron_rl import commands

    try:
        return commands.COMMANDS[options.command](options)
    except (ValueError, OSError) as error:
        print(f"megatron-rl: {error}", file=sys.stderr)
        return 2
    except commands.RunFailed as error:
        print(f"megatron-rl: {error}", file=sys.stderr)
        return 1
    except (commands.RunInterrupted, KeyboardInterrupt) as error:
        print(f"megatron-rl: {error or 'stopped'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
