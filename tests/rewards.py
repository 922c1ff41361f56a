"""A reward for tests that need mixed groups from an untrained model; reached as `tests.rewards.brevity`."""

from megatron_rl.types import Prompt


def brevity(prompt: Prompt, response_text: str) -> float:
    """1 for a response of fewer than 40 characters."""
    return float(len(response_text) < 40)
