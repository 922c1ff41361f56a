"""A reward function of one's own: `reward.routes.math=my_reward.score` (with this folder on PYTHONPATH)."""

from megatron_rl.types import Prompt, Score


def score(prompt: Prompt, response_text: str) -> float | Score:
    """1 for the right number after the last `=` or brace, 0.5 for one that is off by one."""
    digits = response_text.rsplit("{", 1)[-1].rsplit("=", 1)[-1].rstrip("} \n")
    if not digits.lstrip("-").isdigit():
        return Score(0.0, "no_answer")
    distance = abs(int(digits) - int(prompt.answer))
    return max(0.0, 1.0 - 0.5 * distance)
