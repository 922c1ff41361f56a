"""Rewards for tests that need groups of known kinds from an untrained model; reached by their dotted paths."""

from megatron_rl.types import Prompt


def brevity(prompt: Prompt, response_text: str) -> float:
    """1 for a response of fewer than 40 characters."""
    return float(len(response_text) < 40)


def as_marked(prompt: Prompt, response_text: str) -> float:
    """1, 0 or by the response's length, as the problem's column `solved` says: always, never, sometimes."""
    return {"always": 1.0, "never": 0.0, "sometimes": float(len(response_text) % 2)}[prompt.metadata["solved"]]
