"""Section `stages` of the configuration: an RL run in several parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_rl.config.rules import require

STAGED = ("algo", "batch", "data", "eval", "optimizer", "reward", "rollout")


@dataclass(frozen=True)
class StageConfig:
    """One training stage.

    - name: what the stage is called.
    - set: the keys that it changes, e.g. {algo.phi: 8192}.
    - steps: how many steps it takes. The steps of all stages add up to run.steps.
    - plateau_steps, plateau_gain: the stage ends sooner if its mean reward grows by less than plateau_gain from one
      plateau_steps steps to the next plateau_steps steps. 0: it never ends sooner.
    - optimizer: `keep` keeps AdamW's moments and the place in the learning-rate schedule from the stage before; `reset`
      begins both anew. The schedule spans all stages up to the next reset.

    Weights, step numbers, log and checkpoints go on from stage to stage. The order of prompts and the pass rates of
    rollout.pass_rate go on too, unless the stage changes rollout.collector, rollout.pass_rate.enabled, or anything in
    data but weights and curriculum. With data.on_error=skip, three more settings decide which prompts are left out, and
    a change begins a new order: the room for a prompt, reward.routes and reward.shaping. The responses that
    rollout.collector=partial carries are dropped if the stage changes rollout.responses_per_prompt or
    algo.distillation, or lowers rollout.max_response_tokens.
    """

    name: str = ""
    steps: int = 1
    plateau_steps: int = 0
    plateau_gain: float = 0.0
    optimizer: Literal["keep", "reset"] = "keep"
    set: dict[str, object] = field(default_factory=dict)

    def __post_init__(self):
        require(bool(self.name), "stages: every stage needs a name")
        require(self.steps >= 1, f"stages: {self.name}: steps={self.steps} must be at least 1")
        require(self.plateau_steps >= 0,
                f"stages: {self.name}: plateau_steps={self.plateau_steps} must not be negative")
        for key in self.set:
            require(key.split(".")[0] in STAGED and "." in key and not key.startswith("rollout.engine"),
                    f"stages: {self.name}: set.{key} cannot change between stages; keys of "
                    f"{', '.join(STAGED)} can (but for rollout.engine)")
