"""What reward.shaping adds to the rewards of a group before its advantages: length, format, repetition, your own.

Each term is a function of the whole group and gives one number for each response. Verdicts do not change: accuracy,
pass rates and dynamic sampling look at Score.correct. A response without a verdict gets 0 and takes no part in the
group's lengths. Letter: K responses of the group.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch

from megatron_rl.batch.hooks import shaped_by
from megatron_rl.config.reward import THINKING_BEGIN, THINKING_END, ShapingConfig
from megatron_rl.observe.verdicts import judged, number_right
from megatron_rl.types import RolloutGroup


def shaped(group: RolloutGroup, shaping: Sequence[ShapingConfig]) -> dict[str, torch.Tensor]:
    """By the name of the term: what it adds to each reward, float32 [K]."""
    verdicts_K = torch.tensor([not score.failed for score in group.scores])
    found = {}
    for each in shaping:
        term = TERMS.get(each.term)
        values_K = shaped_by(each.term, group) if term is None else torch.tensor(term(group, each))
        found[each.name] = torch.where(verdicts_K, _strength(group, each) * values_K, 0.0)
    return found


def _strength(group: RolloutGroup, shaping: ShapingConfig) -> float:
    """This group's strength: by its prompt's thinking effort, and by how easy it is."""
    effort = group.prompt.metadata.get("effort")
    strength = shaping.efforts[effort] if shaping.efforts and effort is not None else shaping.strength
    if shaping.by_pass_rate:
        strength *= number_right(group) / max(1, len(judged(group)))
    return strength


def length(group: RolloutGroup, _: ShapingConfig) -> list[float]:
    """Evo-CoT (Ling 2.0, arXiv 2510.22115, at second hand): p(l) = 0.5 - (l - l_min) / (l_max - l_min + 1e-9) of l
    sampled tokens if the response is right, else min(p(l), 0). The shortest of the group gets 0.5, the longest -0.5."""
    tokens = [rollout.response_tokens for rollout in group.rollouts]
    known = [count for count, score in zip(tokens, group.scores, strict=True) if not score.failed] or [0]
    shortest, longest = min(known), max(known)
    places = [0.5 - (count - shortest) / (longest - shortest + 1e-9) for count in tokens]
    return [place if score.correct else min(place, 0.0) for place, score in zip(places, group.scores, strict=True)]


def answer_format(group: RolloutGroup, _: ShapingConfig) -> list[float]:
    """Evo-CoT: -0.5 if the answer part, which follows the first </think> or is the whole text, contains <think>."""
    answers = [text.partition(THINKING_END)[2] if THINKING_END in text else text for text in group.texts]
    return [-0.5 if THINKING_BEGIN in answer else 0.0 for answer in answers]


def repetition(group: RolloutGroup, shaping: ShapingConfig) -> list[float]:
    """0 for a text whose zlib compression ratio (compressed / UTF-8 bytes) is at least shaping.ratio, then falling
    linearly to -1 at 0. Ling & Ring 2.6 (arXiv 2606.15079) has such a penalty; the line and its threshold are ours."""
    utf8 = [text.encode("utf-8", errors="replace") for text in group.texts]
    ratios = [len(zlib.compress(text)) / len(text) if text else 1.0 for text in utf8]
    return [min(0.0, ratio / shaping.ratio - 1.0) for ratio in ratios]


TERMS: dict[str, Callable[[RolloutGroup, ShapingConfig], list[float]]] = {
    "length": length, "format": answer_format, "repetition": repetition}
"""Terms by name; any other name is the dotted path of the user's function."""
