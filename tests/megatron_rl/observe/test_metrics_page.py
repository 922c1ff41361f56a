"""docs/metrics.md has a row, with a formula, for each name in the source that is logged, and no other row."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from megatron_rl.orchestrator.evaluation import summary
from megatron_rl.train_step.report import ROUTER_SUMS, TOTALS, metric_name
from tests.megatron_rl.test_evaluation import GROUPS

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "metrics.md").read_text()
NAME = re.compile(r"(?:reward|groups|rollout|budget|train|router|mismatch|sync|extra|time|tokens_per_s|flops|stage|"
                  r"memory|style|agent|prompts)/[a-z0-9_/<>]*[a-z0-9_>]")
ROW = re.compile(r"^\| `([^`]+)` \|([^|]*)\|((?:[^|\\]|\\.)*)\|((?:[^|\\]|\\.)*)\|$", re.MULTILINE)
ROWS = {name: (unit.strip(), formula.strip()) for name, unit, formula, _ in ROW.findall(PAGE)}
NO_METRICS = {"mismatch/diagnostics", "train/<>", "mismatch/<>", "time/<>"}


def literals(*folders: str) -> set[str]:
    """Every string in the source; the values in an f-string are written as <>."""
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        templates = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
        parts = {id(part) for node in templates for part in node.values}
        found |= {"".join(part.value if isinstance(part, ast.Constant) else "<>" for part in node.values)
                  for node in templates}
        found |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
                  and isinstance(node.value, str) and id(node) not in parts}
    return found


def logged_names() -> set[str]:
    """Names in the source of megatron_rl, and those that metric_name makes of the sums of c3po."""
    sums = {text for text in literals("c3po") if re.fullmatch(r"[a-z_0-9]+", text)} & {
        "policy_loss", "kl", "entropy", "ratio", "clip_low_fraction", "clip_high_fraction", "approx_kl",
        "selected_tokens"} | {text for text in literals("c3po") if re.fullmatch(
            r"mismatch_\w+|distill_\w+|(tis|icepop|kpop|sequence)_\w*fraction", text)}
    named = {text for text in literals("megatron_rl") if NAME.fullmatch(text)}
    return (named | {metric_name(key) for key in (*sums, "mismatch_max_abs", *TOTALS)}) - NO_METRICS


def family(name: str) -> str:
    return re.sub(r"<\w*>", "<>", name)


def test_each_name_that_is_logged_has_a_row():
    documented = {family(name) for name in ROWS}
    families = tuple(name.partition("<>")[0] for name in documented if "<>" in name and name != "<>")
    names = logged_names()
    assert len(names) > 60

    def has_a_row(name: str) -> bool:
        pattern = re.escape(name).replace("<>", r"\w+")
        return name in documented or name.startswith(families) or any(re.fullmatch(pattern, row) for row in documented)

    assert {name for name in names if not has_a_row(name)} == set()


def test_each_row_is_of_a_name_that_is_logged():
    names = {family(name) for name in logged_names()} | {f"router/{key}" for key in ROUTER_SUMS} | {"train/mtp_loss"}
    patterns = [re.escape(name).replace("<>", r"\w+") for name in names if "<>" in name and name != "<>"]
    rows = [name for name in ROWS if "/" in name]
    assert len(rows) > 60
    assert [name for name in rows if family(name) not in names and not any(
        re.fullmatch(pattern, name) for pattern in patterns) and not name.startswith("time/")] == []


def test_each_row_has_a_formula():
    assert len(ROWS) > 75 and [name for name, (_, formula) in ROWS.items() if not formula] == []


def test_the_page_has_a_row_for_each_number_of_an_evaluation():
    measured = {re.sub(r"@\d+", "@<k>", name) for name in summary(GROUPS, resamples=5, seed=0)}
    measured = {name for name in measured if not name.endswith(("low", "high"))}
    rows = {name for name in ROWS if "/" not in name} - {"<name>", "seconds"}
    assert measured == rows and len(rows) == 9
