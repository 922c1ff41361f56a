"""One function or class of your own for each place that takes one (docs/extending.md shows each with its command)."""

import json
import re
import zlib

import torch

from c3po import SurrogateTerms


def answers_briefly(groups):
    """A metric: the share of responses of at most 20 characters."""
    texts = [text for group in groups for text in group.texts]
    return {"brief_share": sum(len(text) <= 20 for text in texts) / len(texts)}


def leave_one_out(rewards_PK, judged_PK):
    """An advantage: each reward minus the mean of the group's other rewards (RLOO, arXiv 2402.14740)."""
    judged = judged_PK.to(rewards_PK)
    others = (judged.sum(1, keepdim=True) - judged).clamp(min=1)
    sums = (rewards_PK * judged).sum(1, keepdim=True)
    return rewards_PK - (sums - rewards_PK * judged) / others


def soft_clip(logprobs, log_ratio, advantages, loss_mask, *, eps_low, eps_high):
    """A surrogate: min(r, 1 + eps_high) A, which clips from above only."""
    ratio = log_ratio.exp()
    return SurrogateTerms(objective=ratio.clamp(max=1 + eps_high) * advantages, ratio=ratio,
                          clipped_low=torch.zeros_like(loss_mask), clipped_high=ratio > 1 + eps_high)


def per_root_length(totals, response_lengths):
    """A denominator: a response of n tokens weighs as much as the square root of n."""
    return response_lengths.sqrt() * totals.num_responses


def not_too_easy(rollouts, scores):
    """A filter: leave out groups in which more than three quarters are right."""
    return sum(score.correct is True for score in scores) <= 0.75 * len(scores)


def repetition_penalty(group):
    """Shaping: fine a response whose tokens compress to less than a fifth."""
    def ratio(rollout):
        raw = rollout.token_ids[rollout.trainable].tobytes()
        return len(zlib.compress(raw)) / max(1, len(raw))
    return [-0.1 if ratio(rollout) < 0.2 else 0.0 for rollout in group.rollouts]


def sums():
    """Problems: rows with the columns of a problem file."""
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(1, 40) for b in range(1, 10)]


async def knows_its_tables(ask, step):
    """An evaluation: how many of nine sums are answered right at least once in four tries."""
    found = 0
    for a in range(1, 10):
        found += any(re.search(rf"\b{a + a}\b", text) is not None for text in await ask(f"{a}+{a}=", n=4))
    return {"tables": found / 9}


def keep_texts(step, groups):
    """What is done with a step's responses: the longest text goes to a file."""
    longest = max((text for group in groups for text in group.texts), key=len)
    with open("longest.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "text": longest}) + "\n")


class CsvLogger:
    """A logger: one line of step, name and number for each number that the run logs."""

    def __init__(self, run_dir, config):
        self._file = (run_dir / "numbers.csv").open("a", encoding="utf-8")

    def log(self, step, numbers):
        self._file.writelines(f"{step},{name},{value}\n" for name, value in numbers.items())
        self._file.flush()

    def close(self, finished):
        self._file.close()
