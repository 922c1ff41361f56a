"""The user's own functions in the algorithm (algo.hooks, reward.shaping).

They are found once, and what they return is checked at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from c3po import C3POLossConfig, StepTotals, policy_loss
from megatron_rl.config.reward import SHAPING_TERMS, ShapingConfig
from megatron_rl.config.schema import AlgoConfig
from megatron_rl.foreign import load_function, told
from megatron_rl.types import Rollout, RolloutGroup, Score


def own_function(algo: AlgoConfig, name: str) -> Callable[..., Any] | None:
    """The function that algo.hooks.<name> names, or None. ValueError if it cannot be found."""
    path = getattr(algo.hooks, name)
    return None if path is None else load_function(f"algo.hooks.{name}", path)


def own_advantages(path: str, rewards_PK: torch.Tensor, judged_PK: torch.Tensor) -> torch.Tensor:
    """What algo.hooks.advantage returns, float32 [P, K], with 0 where no response was judged."""
    found = _numbers("algo.hooks.advantage", path, tuple(rewards_PK.shape), rewards_PK, judged_PK)
    advantages = torch.where(judged_PK, found, torch.zeros_like(found))
    if not bool(torch.isfinite(advantages).all()):
        raise ValueError(f"algo.hooks.advantage={path} returned an advantage that is not finite for a judged response")
    return advantages


def shaped_by(path: str, group: RolloutGroup) -> torch.Tensor:
    """What one function of the user's in reward.shaping adds to the rewards of a group, float32 [K]. What it says of a
    failed response does not matter."""
    added = _numbers("reward.shaping", path, (len(group.scores),), group)
    judged = torch.tensor([not score.failed for score in group.scores])
    if not bool(torch.isfinite(added[judged]).all()):
        raise ValueError(f"reward.shaping={path} returned {added.tolist()}: the numbers of judged responses must be "
                         "finite")
    return added


def keeps_group(path: str, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> bool:
    """What algo.hooks.group_filter says of a group."""
    return bool(_called("algo.hooks.group_filter", path, rollouts, scores))


def _called(key: str, path: str, *given: Any) -> Any:
    """What the function returns. ValueError with the key and what the function raised."""
    function = load_function(key, path)
    try:
        return function(*given)
    except Exception as error:  # of the user's code, which raises what it likes
        raise ValueError(f"{key}={path} raised {told(error)}") from error


def _numbers(key: str, path: str, shape: tuple[int, ...], *given: Any) -> torch.Tensor:
    """What the function returns, float32 of this shape."""
    value = _called(key, path, *given)
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{key}={path} returned {type(value).__name__} instead of numbers of shape {shape}") from error
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{key}={path} returned numbers of shape {tuple(tensor.shape)} instead of {shape}")
    return tensor


def check_hooks(algo: AlgoConfig, shaping: Sequence[ShapingConfig]) -> None:
    """Finds every function of algo.hooks and reward.shaping, and tries those on tensors. ValueError names the key."""
    hooks = algo.hooks
    own_function(algo, "group_filter")
    for each in shaping:
        if each.term not in SHAPING_TERMS:
            load_function("reward.shaping", each.term)
    if hooks.advantage is not None:
        rewards_PK = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.5, 0.0]])
        own_advantages(hooks.advantage, rewards_PK, torch.ones_like(rewards_PK, dtype=torch.bool))
    for name in ("surrogate", "denominator"):
        if getattr(hooks, name) is not None:
            own_function(algo, name)
            try:
                _try_loss(algo, only=name)
            except Exception as error:  # of the user's code, which raises what it likes
                raise ValueError(f"algo.hooks.{name}={getattr(hooks, name)} was tried on four tokens: "
                                 f"{told(error)}") from error


def _try_loss(algo: AlgoConfig, *, only: str) -> None:
    """The loss of four tokens, the last of them outside the mask, forward and backward."""
    logprobs = torch.tensor([-0.5, -1.0, -1.5, -2.0], requires_grad=True)
    mask = torch.tensor([True, True, True, False])
    totals = StepTotals(phi=8, selected_tokens=3, num_responses=2, max_response_tokens=4)
    denominator = own_function(algo, "denominator") if only == "denominator" else None
    loss, _ = policy_loss(
        logprobs, logprobs.detach() - 0.1, torch.tensor([1.0, -1.0, 0.5, 0.0]), mask,
        denominator=8 if denominator is None else denominator(totals, torch.tensor([2.0, 2.0, 1.0, 1.0])),
        config=C3POLossConfig(kl_coef=0.0, entropy_coef=0.0),
        surrogate=own_function(algo, "surrogate") if only == "surrogate" else None)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError(f"the gradient is {gradient.tolist()}")
