"""Sums that ask for little or much thought, for experiment=ring_mini, in the quick start's vocabulary.

low.jsonl and high.jsonl: the same sums of 2 to 5 one-digit numbers, with the effort before the question. Worked answers
do not depend on the effort, so the cold start teaches no difference.
`python examples/ring_mini/problems.py` writes them again.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rl.data.chains import Chains

FOLDER = Path(__file__).resolve().parent
EFFORTS = ("low", "high")
ROWS, SEED, MAX_OPERANDS = 600, 23, 5


def rows(effort: str) -> list[dict[str, str]]:
    """No problem twice."""
    chains, found = Chains(size=4 * ROWS, seed=SEED, split="all", task_config={"max_operands": MAX_OPERANDS}), {}
    for index in range(len(chains)):
        problem = chains[index]
        found.setdefault(problem.text, {
            "prompt": f"{effort}:{problem.text}", "answer": problem.answer, "response": problem.response,
            "domain": "math", "effort": effort})
    return list(found.values())[:ROWS]


def lines(effort: str) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows(effort))


if __name__ == "__main__":
    for each in EFFORTS:
        (FOLDER / f"{each}.jsonl").write_text(lines(each), encoding="ascii")
