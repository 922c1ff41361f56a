"""What a pipeline leaves: pipeline.json and report.html in its folder, written anew after every stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.data import EvalConfig
from megatron_rl.config.load import to_dict
from megatron_rl.observe import page
from megatron_rl.observe.files import write_json, write_whole
from megatron_rl.observe.progress import duration
from megatron_rl.observe.report import run_sections, versions_section
from megatron_rl.observe.stats import bootstrap_interval
from megatron_rl.observe.versions import collect_versions
from megatron_rl.pipeline.draw import draw_accuracies, draw_entropies, draw_pass_rates, sets
from megatron_rl.pipeline.plan import Plan, Stage
from megatron_rl.pipeline.record import Record
from megatron_rl.recipes import evaluate, select_checkpoint
from megatron_rl.types import FAILURES

RESULT, REPORT = "pipeline.json", "report.html"
Made = Sequence[tuple[Stage, Record]]


def write_result(plan: Plan, found: Sequence[Record | None]) -> Path:
    """Both files from the stages that are finished; returns the report's path."""
    made = [(stage, record) for stage, record in zip(plan.stages, found, strict=True)
            if record is not None and record.finished]
    write_json(plan.folder / RESULT, result(plan, made))
    body = [f"<h1>{page.text(plan.whole.run.name)}</h1>", _subtitle(plan, made), _summary(made), _accuracy(made),
            _gains(made, plan.whole.eval), _stages(plan, made),
            *(_choice(stage) for stage, _ in made if stage.recipe == "select"), _training(made), _configs(plan, made),
            versions_section([stage.folder for stage, _ in made if _trains(stage)])]
    out = plan.folder / REPORT
    write_whole(out, page.page(f"{plan.whole.run.name} - megatron_rl", [part for part in body if part]))
    return out


def result(plan: Plan, made: Made) -> dict[str, Any]:
    """What pipeline.json holds. Accuracies are those of the model that each stage leaves."""
    return {
        "name": plan.whole.run.name, "finished": len(made) == len(plan.stages),
        "stages": [{
            "name": stage.name, "title": stage.title, "recipe": stage.recipe, "model": record.model,
            "starts": record.starts, "seconds": record.seconds, "evaluation": record.evaluation,
            **({"after": stage.after, "gain": gain(stage, before, plan.whole.eval)}
               if (before := _stage_before(stage, made)) is not None else {}),
            **({"decision": _decision(stage)} if stage.recipe == "select" else {}), "config": to_dict(record.config),
        } for stage, record in made],
        "waiting": [stage.name for stage in plan.stages if stage.name not in {each.name for each, _ in made}],
        "config": to_dict(plan.whole), "versions": collect_versions()}


def _subtitle(plan: Plan, made: Made) -> str:
    note = f"<p>{page.text(plan.whole.pipeline.note)}</p>" if plan.whole.pipeline.note else ""
    return f'<p class="quiet">{len(made)} of {len(plan.stages)} stages are finished</p>{note}'


def _summary(made: Made) -> str:
    """Each set's accuracy before and after everything."""
    first, last = made[0][1].evaluation, made[-1][1].evaluation
    tiles = [(f"{first[name]['accuracy']:.3f} \u2192 {last[name]['accuracy']:.3f}", f"{name}, first and last model")
             for name in sets([first, last]) if name in sets([first]) and name in sets([last])]
    seconds = sum(sum(record.seconds.values()) for _, record in made)
    return page.tiles([*tiles, (duration(seconds), "of training and evaluation")])


def _accuracy(made: Made) -> str:
    evaluations = [record.evaluation for _, record in made]
    names = sets(evaluations)
    rows = [[str(place), stage.title, *(_cell(record.evaluation.get(name)) for name in names)]
            for place, (stage, record) in enumerate(made)]
    first = evaluations[0]
    sizes = ", ".join(f"{name} {first[name]['problems']} x {first[name]['samples_per_problem']}" for name in first)
    figure = page.figure("Accuracy after each stage", draw_accuracies(evaluations), "Bars: the intervals of the table.")
    return (f"<h2>Accuracy after each stage</h2>{page.table(['', 'model after', *names], rows, numbers_from=2)}"
            f'<p class="quiet">Held-out problems x samples: {page.text(sizes)}. Brackets: 95% bootstrap interval over '
            f'problems.</p><div class="plots">{figure}</div>')


def _cell(values: Mapping[str, float] | None) -> str:
    if values is None or "accuracy" not in values:
        return "-"
    return f"{values['accuracy']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"


def gain(stage: Stage, before: Stage, config: EvalConfig) -> dict[str, tuple[float, float, float]]:
    """Set -> (gain in accuracy over the model that the stage started from, low, high).

    Both models were asked the same problems, so the bootstrap interval is of the differences by problem. A problem that
    one of them could not answer, or that has no verdict, is left out.
    """
    ours, theirs = (_shares_by_problem(each) for each in (stage, before))
    differences: dict[str, list[list[float]]] = {}
    for key, share in ours.items():  # in their order, on which the resampling depends
        if key in theirs:
            differences.setdefault(key[0], []).append([share - theirs[key]])
    return {name: bootstrap_interval(values, config.bootstrap_resamples, config.seed)
            for name, values in differences.items()}


def _shares_by_problem(stage: Stage) -> dict[tuple[str, str], float]:
    """(set, problem) -> the share of its samples that are right; problems that failed or are graded are left out."""
    verdicts: dict[tuple[str, str], list[bool | None]] = {}
    with (stage.folder / "evaluation" / evaluate.SAMPLES).open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row["status"] not in FAILURES:
                verdicts.setdefault((row["set"], row["id"]), []).append(row["correct"])
    return {key: sum(map(bool, found)) / len(found) for key, found in verdicts.items() if None not in found}


def _stage_before(stage: Stage, made: Made) -> Stage | None:
    return next((each for each, _ in made if each.name == stage.after), None)


def _gains(made: Made, config: EvalConfig) -> str:
    names = sets([record.evaluation for _, record in made])
    rows = []
    for stage, record in made:
        before = _stage_before(stage, made)
        if before is None:
            continue
        found = gain(stage, before, config)
        lengths = [record.evaluation.get(name, {}).get("mean_response_tokens") for name in names]
        tokens = ["-" if length is None else f"{length:.0f}" for length in lengths]
        rows.append([stage.title, before.title, *(
            f"{found[name][0]:+.3f} [{found[name][1]:+.3f}, {found[name][2]:+.3f}]" if name in found else "-"
            for name in names), " ".join(tokens)])
    if not rows:
        return ""
    return (f"<h2>Gain of every stage</h2>{page.table(['stage', 'over', *names, 'tokens'], rows, numbers_from=2)}"
            '<p class="quiet">By how much the stage\'s model is more accurate than the model that it started from, on '
            "the same problems. Brackets: 95% bootstrap interval of the differences by problem. tokens: mean length of "
            "the stage's responses in each set, in the order of the columns.</p>")


def _stages(plan: Plan, made: Made) -> str:
    done, rows = {stage.name: record for stage, record in made}, []
    for place, stage in enumerate(plan.stages):
        record = done.get(stage.name)
        ran = ["-", "waits", "-"] if record is None else [
            str(record.starts), *(duration(record.seconds.get(key, 0.0)) for key in ("train", "evaluate"))]
        rows.append([str(place), stage.title, stage.name, _work(stage), *ran])
    header = ["", "stage", "folder", "work", "starts", "time", "evaluation"]
    note = ""
    if any(record.starts > 1 for _, record in made):
        note = ('<p class="quiet">A stage with more than one start was stopped in between; its time is that of the '
                "last start.</p>")
    return f"<h2>Stages</h2>{page.table(header, rows, numbers_from=4)}{note}"


def _work(stage: Stage) -> str:
    config = stage.config
    if stage.recipe == "sft":
        return f"{config.sft.total_steps:,} steps, {config.sft.epochs} epochs of {config.sft.examples:,} examples"
    if stage.recipe == "rl":
        budget = f", Phi {config.algo.phi_global(config.parallel.dp):,}" if config.algo.has_budget else ""
        return f"{config.run.steps:,} steps{budget}"
    if stage.recipe == "select":
        return f"{config.select.problems} RL prompts x {config.select.samples} samples from every epoch"
    return "-"


def _choice(stage: Stage) -> str:
    decision = _decision(stage)
    header = ["epoch", "entropy", "pass@1", f"pass@{decision['candidates'][0]['samples']}", "mean length",
              "length variance", "truncated", "SFT tokens", "RL / SFT tokens"]
    rows = []
    for each in decision["candidates"]:
        chosen = " (chosen)" if each["path"] == decision["chosen"] else ""
        rows.append([f"{each['epoch']}{chosen}",
                     f"{each['entropy']:.3f} [{each['entropy_low']:.3f}, {each['entropy_high']:.3f}]",
                     f"{each['pass_at_1']:.3f}", f"{each['pass_at_k']:.3f}", f"{each['mean_length']:.1f}",
                     f"{each['length_variance']:.1f}", f"{each['truncated_fraction']:.3f}",
                     "-" if each["sft_tokens"] is None else f"{each['sft_tokens']:,}",
                     "-" if each["token_efficiency"] is None else f"{each['token_efficiency']:.3f}"])
    rule = decision["rule"]
    figures = (page.figure("Entropy of the SFT epochs", draw_entropies(decision),
                           f"Shaded: {rule['entropy_low']:g} to {rule['entropy_high']:g}, the rule's band."),
               page.figure("Pass rates of the SFT epochs", draw_pass_rates(decision)))
    return (f"<h2>{page.text(stage.title[0].upper() + stage.title[1:])}</h2><p>{page.text(decision['why'])}.</p>"
            f'{page.table(header, rows, numbers_from=1)}<div class="plots">{"".join(figures)}</div>')


def _decision(stage: Stage) -> dict[str, Any]:
    path = select_checkpoint.folder(stage.config) / select_checkpoint.DECISION
    return json.loads(path.read_text(encoding="utf-8"))


def _trains(stage: Stage) -> bool:
    return stage.recipe in ("sft", "rl")


def _training(made: Made) -> str:
    parts = [f"<details><summary>{page.text(stage.title)}</summary>{run_sections(stage.folder)}</details>"
             for stage, _ in made if _trains(stage)]
    return "<h2>Training, stage by stage</h2>" + "".join(parts) if parts else ""


def _configs(plan: Plan, made: Made) -> str:
    shown = [("pipeline and evaluation", plan.whole),
             *((stage.title, record.config) for stage, record in made if stage.recipe != "base")]
    parts = [f"<details><summary>{page.text(title)}</summary><pre>{page.text(json.dumps(to_dict(config), indent=2))}"
             "</pre></details>" for title, config in shown]
    return "<h2>Configuration</h2>" + "".join(parts)
