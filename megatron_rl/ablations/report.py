"""What an ablation leaves: result.json, figure.png, result.md, and the same block in the example's README."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.ablations.draw import draw
from megatron_rl.ablations.driver import Plan
from megatron_rl.ablations.results import RULE, Table, Verdict, judge, mean_and_spread, tabulate, whole_seeds
from megatron_rl.ablations.spec import Ablation, PaperTable
from megatron_rl.config.resources import EXAMPLES
from megatron_rl.observe.files import write_json, write_whole
from megatron_rl.observe.sinks import VERSIONS

NAMED_PACKAGES = ("torch", "megatron-core", "sglang")


def write_result(ablation: Ablation, todo: Plan, folder: Path, *, scale: str, command: str) -> str | None:
    """result.json, result.md and figure.png in `folder`; the text, or None while no seed is finished in every arm."""
    seeds = whole_seeds(todo)
    if not seeds:
        return None
    table = tabulate(ablation, todo, seeds)
    planned = len({run.seed for run in todo.runs})
    verdicts = [verdict for verdict in (judge(each, table, planned) for each in ablation.statements) if verdict]
    versions = json.loads((todo.runs[0].folder / VERSIONS).read_text())
    folder.mkdir(parents=True, exist_ok=True)
    if ablation.panels:
        draw(ablation, todo, table, seeds, folder / "figure.png")
    write_json(folder / "result.json", _plain({
        "title": ablation.title, "scale": scale, "command": command, "seeds": seeds, "rule": RULE, "values": table,
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts], "versions": versions}))
    text = markdown(ablation, table, verdicts, seeds, versions, scale=scale, command=command,
                    unfinished=sum(not run.finished() for run in todo.runs))
    write_whole(folder / "result.md", text)
    return text


def markdown(ablation: Ablation, table: Table, verdicts: Sequence[Verdict], seeds: Sequence[int], versions: dict, *,
             scale: str, command: str, unfinished: int) -> str:
    """The result as it stands in a README: table, verdicts, figure, machine; all of it computed.

    A column that no run of this scale has measured is left out.
    """
    machine, packages = versions["machine"], versions["packages"]
    made_with = ", ".join(f"{name} {packages[name]}" for name in NAMED_PACKAGES if packages.get(name))
    measured = [column for column in ablation.columns
                if any(math.isfinite(value) for values in table.values() for value in values[column.label])]
    parts = [f"`{command}`: seeds {', '.join(map(str, seeds))}; mean and standard deviation over seeds.",
             _rows(["arm", *(column.label for column in measured)],
                   [[ablation.arms[arm], *(_cell(values[column.label], column.digits) for column in measured)]
                    for arm, values in table.items()])]
    if unfinished:
        parts.insert(1, f"**Not run to its end**: {unfinished} runs are missing; only whole seeds are counted.")
    if ablation.paper is not None:
        parts.append(_paper(ablation.paper))
    if verdicts:
        parts += [_rows(["claim", "difference", "95% interval", "verdict", "could detect"],
                        [_verdict(each) for each in verdicts]),
                  f"Rule: {RULE}"]
    if ablation.panels:
        parts.append(f"![{ablation.title}](result-{scale}.png)")
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    commit = versions["git"]["commit"][:7] if versions["git"] else "unknown"
    parts.append(f"Machine: {machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']} GB, {gpus}; "
                 f"Python {versions['python']}, {made_with}; commit {commit}.")
    return "\n\n".join(parts) + "\n"


def publish(name: str, folder: Path, *, scale: str) -> Path:
    """Put folder/result.md between the README's markers of this scale, and the figure beside it.

    ValueError: no markers.
    """
    readme = EXAMPLES / name / "README.md"
    begin, end = f"<!-- result: {scale} -->", f"<!-- end: {scale} -->"
    before, found, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{readme}: no lines {begin} and {end}, between which the result would stand")
    block = (folder / "result.md").read_text()
    if (folder / "figure.png").is_file():
        shutil.copyfile(folder / "figure.png", readme.parent / f"result-{scale}.png")
    write_whole(readme, f"{before}{begin}\n{block}{end}{after}")
    return readme


def _plain(value: Any) -> Any:
    """JSON knows no NaN: null stands for what was not measured."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(values: Sequence[float], digits: int) -> str:
    mean, spread = mean_and_spread(values)
    if not math.isfinite(mean):
        return "-"
    return f"{mean:,.{digits}f}" + (f" +- {spread:,.{digits}f}" if math.isfinite(spread) else "")


def _verdict(verdict: Verdict) -> list[str]:
    interval = f"{verdict.low:+.4g} to {verdict.high:+.4g}" if math.isfinite(verdict.low) else "-"
    difference = f"{verdict.difference:+.4g}" if math.isfinite(verdict.difference) else "-"
    could = f"{verdict.detectable:.2g}" if math.isfinite(verdict.detectable) else "-"
    return [verdict.statement.text, difference, interval, f"**{verdict.verdict}**", could]


def _paper(paper: PaperTable) -> str:
    return f"{paper.caption}\n\n" + _rows(["model", *paper.columns],
                                          [[name, *values] for name, values in paper.rows.items()])
