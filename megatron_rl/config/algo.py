"""Section `algo` of the configuration: the objective, the token budget, the losses and the corrections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from c3po import C3POLossConfig, Normalisation
from megatron_rl.config.distillation import DistillationConfig
from megatron_rl.config.rules import require, require_pattern

SENTENCE_END = (r"""(?:[.!?;\u2026]+["')\]]*(?=\s|\Z)|[\u3002\uff01\uff1f\uff1b]+["\u201d\u2019)\uff09]*|\n)"""
                r"(?:[ \t]*\n)*")
"""Marks that end a sentence, closing quotes and brackets after them, and the line breaks that follow."""


@dataclass(frozen=True)
class AlgoHooks:
    """Functions of your own in the algorithm, by dotted path (package.module.function). docs/extending.md has an
    example of each. K: responses of a group. null: the project's own.

    - advantage: (rewards_PK, judged_PK) -> advantages [P, K], instead of the group-relative ones.
    - surrogate: (logprobs, log_ratio, advantages, loss_mask, *, eps_low, eps_high) -> c3po.SurrogateTerms, instead of
      algo.loss.surrogate. All are tensors [T].
    - denominator: (c3po.StepTotals, response_lengths [T]) -> a number or a tensor [T], instead of what algo.objective
      divides by. Whether the step is cut at Phi still follows from algo.objective.
    - group_filter: (rollouts, scores) -> whether the step draws from the group, besides algo.dynamic_sampling.
    """

    advantage: str | None = None
    surrogate: str | None = None
    denominator: str | None = None
    group_filter: str | None = None


@dataclass(frozen=True)
class AlgoConfig:
    """C3PO (arXiv 2506.14731): the token budget Phi and the losses of Eq. 6. Section `algo`.

    - objective: what the loss of a step is divided by. `c3po`: Phi, and only here the step is cut at Phi; the others
      train on every response token. `grpo`: each response's length times the number of responses. `dr_grpo`: the number
      of responses times rollout.max_response_tokens (with advantage_scale=none). `token_mean` (DAPO): the step's
      tokens.
    - phi: response tokens of one optimiser step. scope: phi counts the tokens of the whole cluster, or of each
      data-parallel rank.
    - cutoff: the response that reaches phi is cut there (`token`), or taken whole (`response`).
    - order: the budget takes single responses in a permutation of the step (`responses`), or whole groups in the order
      in which they were drawn (`groups`). With `groups`, responses after the cut need not be generated.
    - underfull: what happens if a step has fewer than phi tokens.
    - max_collect_rounds: how often a step may sample prompts until its budget is full, or without a budget until it has
      rollout.prompts_per_step mixed groups.
    - updates_per_rollout: optimiser steps on one rollout. Its responses are dealt among them.
    - advantage_scale: advantages are divided by the group's standard deviation (`std`), or not (`none`).
    - dynamic_sampling: leave out groups whose responses are all right or all wrong, before the cut and whatever shaping
      makes of their rewards. A group with a graded response is left out if its unshaped rewards are equal.
    - sentence_end: with algo.loss.surrogate=lpo, a regular expression (Python's re) whose matches end the sentences of
      a response. It sees the text of the response's tokens. The default ends them at . ! ? ; before white space, at
      their full-width forms, and at line breaks.
    - balance_coef, z_loss_coef: coefficients of the router's losses.
    - truncated: a response that the length limit cut is trained on (`train`), left out of the loss (`mask`), or fined
      (`overlong_penalty`, DAPO). overlong_buffer_tokens: the fine grows over this many tokens before the limit. It
      counts the tokens that rollout.max_response_tokens counts: all after the prompt, sampled or given by an
      environment.
    - mismatch: weigh each token by old / rollout, with `tis`, `icepop` or `kpop`. tis_cap: `tis` caps the weight there.
    - icepop_low, icepop_high: `icepop` drops a token whose weight lies outside. kpop_max_kl: `kpop` drops a token whose
      binary KL is larger, in nats.
    - sequence_ratio_low, sequence_ratio_high (set both or none): reject a response whose geometric mean of old /
      rollout lies outside. sequence_min_token_ratio: reject it if its smallest ratio lies below, e.g. 1e-4. All
      corrections act on the policy gradient only, and go with every objective and every algo.loss.surrogate.
    - router_replay: whose choice of experts the trainer repeats. `rollout`: the engine's. `trainer`: its own, from the
      pass before the first update. `none`: each forward chooses anew. It goes with every objective and mismatch.
    """

    objective: Normalisation = "c3po"
    phi: int = 4096
    scope: Literal["global", "per_dp_rank"] = "global"
    cutoff: Literal["token", "response"] = "token"
    order: Literal["responses", "groups"] = "responses"
    underfull: Literal["collect_more", "train_short", "error"] = "collect_more"
    max_collect_rounds: int = 8
    updates_per_rollout: int = 1
    advantage_scale: Literal["std", "none"] = "std"
    dynamic_sampling: bool = False
    loss: C3POLossConfig = field(default_factory=C3POLossConfig)
    hooks: AlgoHooks = field(default_factory=AlgoHooks)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    sentence_end: str = SENTENCE_END
    balance_coef: float = 1e-5
    z_loss_coef: float = 1e-7
    truncated: Literal["train", "mask", "overlong_penalty"] = "train"
    overlong_buffer_tokens: int = 0
    mismatch: Literal["none", "tis", "icepop", "kpop"] = "none"
    tis_cap: float = 2.0
    icepop_low: float = 0.5
    icepop_high: float = 5.0
    kpop_max_kl: float = 0.1
    sequence_ratio_low: float | None = None
    sequence_ratio_high: float | None = None
    sequence_min_token_ratio: float | None = None
    router_replay: Literal["none", "rollout", "trainer"] = "none"

    def __post_init__(self):
        require(self.phi >= 1, f"algo.phi={self.phi} must be at least 1 token")
        for name in ("updates_per_rollout", "max_collect_rounds"):
            require(getattr(self, name) >= 1, f"algo.{name}={getattr(self, name)} must be at least 1")
        require_pattern("algo.sentence_end", self.sentence_end)
        require(self.balance_coef >= 0, f"algo.balance_coef={self.balance_coef} must not be negative")
        require(self.z_loss_coef >= 0, f"algo.z_loss_coef={self.z_loss_coef} must not be negative")
        require(self.distillation.task_reward or not self.dynamic_sampling,
                "algo.distillation.task_reward=false trains on every group, whatever is right in it: use "
                "algo.dynamic_sampling=false")
        for key, rewards in (("truncated=overlong_penalty", self.truncated == "overlong_penalty"),
                             (f"hooks.advantage={self.hooks.advantage}", self.hooks.advantage is not None)):
            require(self.distillation.task_reward or not rewards,
                    f"algo.{key} with algo.distillation.task_reward=false, which trains on no reward: leave one out")
        require(self.truncated != "overlong_penalty" or self.overlong_buffer_tokens > 0,
                "algo.truncated=overlong_penalty needs algo.overlong_buffer_tokens > 0")
        require(0 < self.icepop_low < self.icepop_high,
                f"algo.icepop_low={self.icepop_low} must be positive and below algo.icepop_high={self.icepop_high}")
        for name in ("tis_cap", "kpop_max_kl"):
            require(getattr(self, name) > 0, f"algo.{name}={getattr(self, name)} must be positive")
        low, high, least = self.sequence_ratio_low, self.sequence_ratio_high, self.sequence_min_token_ratio
        require((low is None) == (high is None),
                f"algo.sequence_ratio_low={low} and algo.sequence_ratio_high={high}: set both or none")
        require(low is None or 0 < low < high,
                f"algo.sequence_ratio_low={low} must be positive and below algo.sequence_ratio_high={high}")
        require(least is None or 0 < least < 1, f"algo.sequence_min_token_ratio={least} must lie in (0, 1)")

    @property
    def has_budget(self) -> bool:
        """Whether a step is cut at Phi tokens."""
        return self.objective == "c3po"

    @property
    def leaves_groups_out(self) -> bool:
        """Whether a whole group may offer no token, which shows when its last response is judged."""
        return self.dynamic_sampling or self.hooks.group_filter is not None

    @property
    def corrects_mismatch(self) -> bool:
        return self.mismatch != "none" or self.rejects_sequences

    @property
    def rejects_sequences(self) -> bool:
        return self.sequence_ratio_low is not None or self.sequence_min_token_ratio is not None

    @property
    def needs_whole_sequences(self) -> bool:
        """Whether the loss of a token depends on other tokens of its sequence."""
        return self.loss.surrogate in ("gspo", "lpo") or self.rejects_sequences

    @property
    def needs_sentences(self) -> bool:
        """Whether the loss asks which sentence a token belongs to."""
        return self.loss.surrogate == "lpo" and self.hooks.surrogate is None

    def phi_global(self, dp: int) -> int:
        """Phi of one optimiser step over the whole cluster, in response tokens (spec note on Phi)."""
        return self.phi if self.scope == "global" else self.phi * dp
