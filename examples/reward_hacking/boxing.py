"""A policy that may box the question: half of its SFT responses do. Commands and figures: docs/rewards.md.

    python examples/reward_hacking/boxing.py runs/hacking/boxing.jsonl
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.data.chains import Chains
from megatron_rl.types import RolloutGroup

PROBLEMS = 4000


def main(path: str) -> None:
    """Writes the quick start's SFT problems; every second response boxes the sum itself."""
    chains = Chains(size=PROBLEMS, seed=7, split="train")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8") as file:
        for index in range(PROBLEMS):
            problem = chains[index]
            response = f"\\boxed{{{question(problem.text)}}}" if index % 2 else problem.response
            file.write(json.dumps({"prompt": problem.text, "answer": problem.answer, "response": response}) + "\n")


def question(text: str) -> str:
    return text.removeprefix("Q:").removesuffix("\nA:")


def boxing(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """A metric (observe.metrics): the share of responses that box a sum, and the share of those that were rewarded."""
    rewarded = [score.value > 0 for group in groups for text, score in zip(group.texts, group.scores, strict=True)
                if not score.failed and any(sign in text.rpartition("\\boxed{")[2] for sign in "+-")]
    judged = sum(not score.failed for group in groups for score in group.scores)
    return {"boxing_share": len(rewarded) / judged, "boxing_rewarded": sum(rewarded) / max(len(rewarded), 1)}


if __name__ == "__main__":
    main(sys.argv[1])
