"""The quick start: a random Mixture-of-Experts model becomes a better one, all on real Megatron and SGLang.

Stages in one folder: init/ (random weights and a tokenizer) -> sft/ -> rl/ -> rl/report.html. One engine serves
every stage; it starts with the random weights and loads or receives what comes after.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_rl.config.check import check_evaluates
from megatron_rl.config.load import load
from megatron_rl.config.schema import Config
from megatron_rl.data import chains_tokenizer
from megatron_rl.launch.local import engines_for, run_ranks
from megatron_rl.launch.programs import run_rl
from megatron_rl.model.fresh import FRESH_FAMILIES, bailing_config, random_weights
from megatron_rl.model.hf_folder import write_hf_folder
from megatron_rl.observe.report import LABELS, write_report
from megatron_rl.recipes import evaluate

ROOT = Path("runs/quickstart")
FLASH_HEAD_DIM = 64
"""The smallest that the engine's attention kernels on a GPU take; on a CPU heads have 24."""
COLUMNS = ("stage", "held-out accuracy", "95% interval", "direct answers", "accuracy when reasoning", "tokens")


def run(overrides: Sequence[str], console: Console, model_type: str = FRESH_FAMILIES[0]) -> Path:
    """Run all stages; `overrides` apply to the RL stage (and run.seed to all). Returns the report's path.

    model_type: the random model's family, one of FRESH_FAMILIES.
    """
    if model_type not in FRESH_FAMILIES:
        raise ValueError(f"model={model_type} must be one of {', '.join(FRESH_FAMILIES)}")
    started = time.perf_counter()
    folder = free_folder(ROOT)
    here = overrides_on(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    rl = load(["experiment=quickstart", *here, f"run.dir={folder / 'rl'}", f"model.path={folder / 'sft' / 'hf'}",
               *overrides])
    check_evaluates(rl, "the quick start")
    seed = rl.run.seed
    sft = load(["experiment=quickstart_sft", *here, f"run.dir={folder / 'sft'}", f"model.path={folder / 'init'}",
                f"run.seed={seed}"])
    console.print(f"[bold]1/4[/bold] a random Mixture-of-Experts model in {folder / 'init'}")
    make_random_model(folder / "init", seed, model_type=model_type, **({"head_dim": FLASH_HEAD_DIM} if here else {}))
    with engines_for(rl, str(folder / "init"), folder / "engine.log") as served:
        before_sft = evaluate.run(at(served, folder / "init"))
        console.print("[bold]2/4[/bold] supervised fine-tuning on sums in steps (Megatron, "
                      f"{sft.parallel.world_size} rank(s), EP {sft.parallel.ep})")
        run_ranks("sft", sft)
        console.print(f"[bold]3/4[/bold] C3PO: {rl.algo.phi} training tokens in each of {rl.run.steps} steps "
                      "(Megatron trains, SGLang samples, Math-Verify judges)")
        run_rl(served)
    results = label_stages(folder / "rl", before_sft)
    console.print("[bold]4/4[/bold] report")
    console.print(result_table(results))
    report = write_report([folder / "rl"], folder / "report.html")
    gain = 100 * (results["after_rl"]["accuracy"] - results["after_sft"]["accuracy"])
    console.print(f"C3PO added {gain:+.1f} points. Report: [bold]{report}[/bold]  "
                  f"(took {time.perf_counter() - started:.0f} s)")
    return report


def overrides_on(gpus: int) -> list[str]:
    """Nothing on a CPU. On GPUs bfloat16, since engines there have no float32; one rank for each of at most two GPUs,
    since two cannot share one; and engines on a GPU of their own if there is a third."""
    if gpus == 0:
        return []
    return ["model.dtype=bfloat16", "parallel=single" if gpus == 1 else "parallel=ep2",
            *(["rollout.engine.first_gpu=2"] if gpus > 2 else [])]


def free_folder(root: Path) -> Path:
    """`root`, or root-2, root-3, ...: an earlier quick start is never written over."""
    candidate, number = root, 1
    while candidate.exists():
        number += 1
        candidate = root.with_name(f"{root.name}-{number}")
    candidate.mkdir(parents=True)
    return candidate


def make_random_model(folder: Path, seed: int, **sizes: Any) -> None:
    """About 0.6M parameters: 4 layers, 8 experts top-2, one shared expert, the task's own 96-token vocabulary.

    sizes: keys of config.json that are to differ (model/fresh.py: bailing_config).
    """
    tokenizer = folder.with_name("tokenizer")
    chains_tokenizer(tokenizer)
    config = bailing_config(**sizes)
    write_hf_folder(folder, config, random_weights(config, seed, scheme="scaled"), tokenizer_from=tokenizer)


def at(config: Config, folder: Path) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder)))


def label_stages(run_dir: Path, before_sft: dict[str, float]) -> dict[str, dict]:
    """Put the evaluation before SFT in front of the run's own, whose first is the one after SFT; the three by label."""
    path = run_dir / "eval.jsonl"
    first, *later = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{"step": 0, "label": "before_sft", **before_sft}, {**first, "label": "after_sft"}, *later]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {row["label"]: row for row in rows if row["label"] in LABELS}


def result_table(results: dict[str, dict]) -> Table:
    table = Table(*COLUMNS, title="quick start")
    table.columns[COLUMNS.index("95% interval")].no_wrap = True
    for stage, row in results.items():
        direct, reasoning = (f"{row[key]:.{digits}f}" if key in row else "-"  # of observe.metrics
                             for key, digits in (("direct_share", 2), ("reasoning_accuracy", 3)))
        table.add_row(LABELS[stage], f"{row['accuracy']:.3f}", f"{row['low']:.3f} - {row['high']:.3f}",
                      direct, reasoning, f"{row['mean_response_tokens']:.1f}")
    return table
