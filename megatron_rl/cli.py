"""`megatron-rl COMMAND [key=value ...]`: one command per recipe; every key of conf/ can be set on the line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_rl import usage

SHELLS = ("bash", "zsh")
RANK_KEYS = ("rank", "ranks")
"""Options of `rehearse` that are written like keys of the configuration, and are none."""
LAUNCHERS = ("basic", "submitit_slurm")


class PrintVersion(argparse.Action):
    """Reads the version when it is asked for, because its home imports torch."""

    def __init__(self, **options):
        super().__init__(nargs=0, **options)

    def __call__(self, top, *_):
        from megatron_rl import __version__

        print(f"megatron-rl {__version__}")
        top.exit()


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="megatron-rl", description=__doc__, epilog=usage.TOP_EXAMPLES,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action=PrintVersion, help="print the version and exit")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parts = {name: _add(commands, name, text) for name, text in usage.COMMANDS.items()}
    for name in ("quickstart", "rl", "sft", "pipeline", "plan", "rehearse", "evaluate", "serve", "select-checkpoint",
                 "slurm", "torchrun", "engine"):
        _overrides(parts[name])
    parts["completion"].set_defaults(top=top)
    for name in ("rl", "sft", "pipeline"):
        parts[name].add_argument("--check", action="store_true",
                                 help="validate, print the resolved layout, start nothing")
    parts["plan"].add_argument("--gpu-memory", type=positive, default=80.0, metavar="GB",
                               help="of one GPU (default 80)")
    parts["plan"].add_argument("--colocated", action="store_true",
                               help="the engine takes rollout.engine.mem_fraction_static of the same GPUs")
    parts["rehearse"].add_argument("--json", default=None, metavar="FILE", help="also write everything to FILE")
    parts["rehearse"].add_argument("--trace", default=None, metavar="FILE",
                                   help="also write the rehearsed ranks' update on one clock, for ui.perfetto.dev")
    parts["rehearse"].add_argument("--page", default=None, metavar="FILE",
                                   help="also write a page to look at: memory over the step, timeline, tables")
    parts["rehearse"].add_argument("--imbalance", default="1", metavar="X|RUN_DIR",
                                   help="rows of this rank's experts over the mean (default 1: even), or a run whose "
                                   "recorded loads the busiest expert of each layer gets")
    parts["rehearse"].add_argument("--lengths", default=None, metavar="uniform|lognormal:MEAN:SIGMA|RUN_DIR[:FACTOR]",
                                   help="lengths of responses, which the run's own schedule packs (default: full "
                                   "micro-batches)")
    parts["rehearse"].add_argument("--layouts", type=positive_int, default=None, metavar="N",
                                   help="instead compare the layout with the N fastest that `plan` proposes")
    parts["rehearse"].add_argument("--collectors", action="store_true",
                                   help="instead compare whole RL steps with every rollout.collector")
    parts["rehearse"].add_argument("--engines", type=positive_int, default=None, metavar="N",
                                   help="with --collectors: engines apart from the ranks (default: as many GPUs as "
                                   "the ranks have)")
    parts["rehearse"].add_argument("--rates", default=None, metavar="FILE",
                                   help="rates of the card, links and engines (docs/rehearsal.md; default: an H800's)")
    parts["rehearse"].add_argument("--calibrate", default=None, metavar="FILE",
                                   help="instead measure on this machine's GPU what --rates reads, and write it")
    parts["rehearse"].set_defaults(own_keys=RANK_KEYS)
    parts["quickstart"].set_defaults(own_keys=("model",))
    parts["torchrun"].add_argument("--nodes", type=positive_int, required=True, metavar="N",
                                   help="machines with ranks, equally many on each")
    parts["torchrun"].add_argument("--master", default=None, metavar="HOST[:PORT]",
                                   help="the machine with number 0 (default: this one, and a free port)")
    parts["slurm"].add_argument("--dry-run", action="store_true", help="print the batch script, submit nothing")
    _add_data(parts["data"])
    _add_convert(parts["convert"])
    _add_config(parts["config"])
    _add_ablate(parts["ablate"])
    parts["replay-step"].add_argument("folder", metavar="DUMP")
    parts["report"].add_argument("runs", nargs="+", metavar="RUN_DIR")
    parts["report"].add_argument("--out", default=None, metavar="FILE", help="default: report.html in the run, or "
                                 "comparison.html in the first of several")
    parts["completion"].add_argument("shell", choices=SHELLS)
    return top


def _add(commands, name: str, text: usage.Help) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text.line, description=text.description, epilog=text.epilog,
                               formatter_class=argparse.RawDescriptionHelpFormatter)


def _overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="key=value",
                         help="keys of the configuration, e.g. algo.phi=4096")


def _add_data(data: argparse.ArgumentParser) -> None:
    steps = data.add_subparsers(dest="step", required=True, metavar="STEP")
    for name, text in usage.DATA.items():
        step = _add(steps, name, text)
        _overrides(step)
        step.add_argument("--out", required=True, metavar="DIR", help="for kept.jsonl, removed.jsonl and report.json")
        if name == "dedup":
            step.add_argument("--threshold", type=float, default=0.7, help="similarity (default 0.7)")
            step.add_argument("--ignore-numbers", action="store_true",
                              help="near-duplicates may differ in their numbers")
        if name == "decontaminate":
            step.add_argument("--against", action="append", required=True, metavar="KIND:FILE",
                              help="a benchmark (jsonl:, parquet:, aime:, gpqa:, livecodebench:); may be repeated")
            step.add_argument("--ngram", type=positive_int, default=10, help="words that make one match (default 10)")
            step.add_argument("--share", type=positive, default=0.5,
                              help="of the shorter text's n-grams that must match (default 0.5)")
        if name == "verify":
            step.add_argument("--samples", type=int, default=0, help="also ask a model so often (default 0: do not)")
            step.add_argument("--agreement", type=float, default=0.5,
                              help="share of samples with one other answer that removes (default 0.5)")
        if name == "difficulty":
            step.add_argument("--samples", type=positive_int, default=8, help="responses to each problem (default 8)")
            step.add_argument("--keep-always-solved", action="store_true")
            step.add_argument("--keep-never-solved", action="store_true", help="for a stronger model to try")


def _add_convert(convert: argparse.ArgumentParser) -> None:
    kinds = convert.add_subparsers(dest="kind", required=True, metavar="KIND")
    parts = {name: _add(kinds, name, text) for name, text in usage.CONVERT.items()}
    parts["upcycle"].add_argument("source", metavar="SOURCE", help="a Hugging Face folder of a dense model")
    parts["upcycle"].add_argument("target", metavar="TARGET", help="the folder to write")
    parts["upcycle"].add_argument("--model-type", default="bailing_moe",
                                  help="what it becomes: bailing_moe (the default) or bailing_moe_v2")
    parts["upcycle"].add_argument("--experts", type=positive_int, default=8, help="routed experts (default 8)")
    parts["upcycle"].add_argument("--experts-per-token", type=positive_int, default=2, help="default 2")
    parts["smollm2"].add_argument("target", metavar="TARGET", help="the folder to write")
    _overrides(parts["roundtrip"])
    _overrides(parts["merge"])


def _add_config(config: argparse.ArgumentParser) -> None:
    views = config.add_subparsers(dest="view", required=True, metavar="VIEW")
    parts = {name: _add(views, name, text) for name, text in usage.CONFIG.items()}
    _overrides(parts["show"])
    parts["explain"].add_argument("key", metavar="KEY")
    parts["diff"].add_argument("left", metavar="LEFT")
    parts["diff"].add_argument("right", metavar="RIGHT", nargs="?", default="defaults",
                               help="default: the schema's defaults")


def _add_ablate(ablate: argparse.ArgumentParser) -> None:
    ablate.add_argument("name", metavar="EXAMPLE", help="a folder of examples/ with an ablation.yaml")
    ablate.add_argument("settings", nargs="*", metavar="key=value")
    ablate.add_argument("--check", action="store_true", help="compose and validate every run, start nothing")
    ablate.add_argument("--slurm", action="store_true", help="submit a job per run instead (then --collect)")
    ablate.add_argument("--multirun", choices=LAUNCHERS, help="as a Hydra multirun: one job for each arm and seed, by "
                        "this launcher (submitit_slurm: on Slurm, one node each), then the result")
    ablate.add_argument("--collect", action="store_true", help="run nothing, write the result of what is finished")
    ablate.add_argument("--readme", action="store_true", help="put the result into the example's README")


def positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be positive")
    return value


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """SystemExit with what to do when a word is not understood. key=value and options may come in any order."""
    options, more = parser().parse_known_args(arguments)
    if more:  # argparse takes positional arguments before the first option, or after it, but not both
        pairs = next((getattr(options, name) for name in ("overrides", "settings") if hasattr(options, name)), None)
        wrong = [text for text in more if pairs is None or text.startswith("-") or "=" not in text]
        if wrong:
            parser().error(f"{options.command} does not take {' '.join(wrong)}: see megatron-rl {options.command} "
                           "--help" + (" (keys are written key=value, without dashes)" if pairs is not None else ""))
        pairs += more
    if options.command == "rehearse":
        _take_ranks(options)
    if options.command == "quickstart":
        _take_model(options)
    return options


def _take_model(options: argparse.Namespace) -> None:
    """options.model: the family that model=... asks for; out of the overrides with it."""
    own = [text for text in options.overrides if text.startswith("model=")]
    options.overrides = [text for text in options.overrides if text not in own]
    options.model = (own or ["model=bailing_moe"])[-1].removeprefix("model=")


def _take_ranks(options: argparse.Namespace) -> None:
    """options.ranks: those that were asked for, none for ranks=stages; out of the overrides with them."""
    own = [text for text in options.overrides if text.split("=", 1)[0] in RANK_KEYS]
    options.overrides = [text for text in options.overrides if text not in own]
    if len(own) > 1:
        parser().error(f"rehearse takes one of rank=N and ranks=stages, not {' '.join(own)}")
    key, _, value = (own or ["rank=0"])[0].partition("=")
    if key == "ranks" and value != "stages":
        parser().error(f"ranks={value}: only ranks=stages, one rank of each distinct kind; for one rank write rank=N")
    if key == "rank" and not value.isdecimal():
        parser().error(f"rank={value} must be a rank's number, from 0")
    options.ranks = [] if key == "ranks" else [int(value)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 the run failed, 2 the input is wrong and nothing was started, 130 interrupted."""
    options = parse(arguments)
    try:
        from megatron_rl import commands
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("megatron_rl"):
            raise
        print(f"megatron-rl: {error}: a base install brings torch alone, and this command needs more. In the source "
              "tree: pip install '.[trainer,rewards,report]'", file=sys.stderr)
        return 2
    try:
        return commands.COMMANDS[options.command](options)
    except (ValueError, OSError) as error:
        commands.warn(told(error))
        return 2
    except commands.RunFailed as error:
        commands.warn(told(error))
        return 1
    except (commands.RunInterrupted, KeyboardInterrupt) as error:
        commands.warn(str(error) or "stopped")
        return 130


def told(error: BaseException) -> str:
    """Never empty."""
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
