"""verl's registries take our advantage estimator and our loss, and what they return is c3po's own value."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from c3po import C3POLossConfig, c3po_loss, group_advantages

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError,
                                 reason="verl is not importable; examples/c3po_in_verl/README.md installs it")
FOLDER = Path(__file__).resolve().parents[2] / "examples" / "c3po_in_verl"
PHI = 7
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])


@pytest.fixture(scope="module", autouse=True)
def registered():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("c3po_in_verl")
    sys.path.remove(str(FOLDER))


def actor_config(dp_size: int = 1, **overrides):
    from verl.workers.config import ActorConfig

    settings = {"strategy": "fsdp", "rollout_n": 2, "ppo_micro_batch_size_per_gpu": 2, "loss_agg_mode": "token-sum",
                "loss_scale_factor": PHI, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
    config = ActorConfig(**(settings | overrides))
    config.global_batch_info["dp_size"] = dp_size
    return config


def batch():
    random = torch.Generator().manual_seed(3)
    old, new, weights = (torch.randn(4, 4, generator=random) * scale for scale in (1.0, 1.0, 0.1))
    new = (old + 0.3 * new).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None].expand(4, 4)
    return old, new, advantages, weights.exp()


def call(rows: slice, config, new, old, advantages, weights):
    loss = core_algos.get_policy_loss_fn("c3po")
    return loss(old_log_prob=old[rows], log_prob=new[rows], advantages=advantages[rows], response_mask=MASK[rows],
                loss_agg_mode=config.loss_agg_mode, config=config, rollout_is_weights=weights[rows])


def test_the_registered_loss_is_c3pos_own():
    old, new, advantages, weights = batch()
    ours, sums = c3po_loss(new, old, advantages, MASK.bool(), phi=PHI, weights=weights,
                           config=C3POLossConfig(clip_eps_high=0.28, kl_coef=0.0, entropy_coef=0.0))
    theirs, metrics = call(slice(None), actor_config(), new, old, advantages, weights)
    assert torch.equal(theirs, ours)
    assert torch.equal(*(torch.autograd.grad(loss, new)[0] for loss in (theirs, ours)))
    assert metrics["actor/pg_clipfrac"] == pytest.approx(float(sums["clip_high_fraction"].sum) / 10)


def test_ranks_and_micro_batches_add_up_to_the_step():
    old, new, advantages, weights = batch()
    whole, _ = call(slice(None), actor_config(), new, old, advantages, weights)
    halves = [call(rows, actor_config(dp_size=2), new, old, advantages, weights)[0]
              for rows in (slice(0, 2), slice(2, 4))]
    assert torch.allclose(sum(halves) / 2, whole, atol=1e-6)


def test_the_registered_estimator_keeps_phi_tokens_of_whole_group_advantages():
    rewards = torch.zeros(4, 4)
    rewards[:, 0] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    estimator = core_algos.get_adv_estimator_fn("c3po")
    advantages, _ = estimator(token_level_rewards=rewards, response_mask=MASK,
                              index=np.array(["a", "b", "a", "b"], dtype=object), config={"c3po_phi": PHI})
    kept = advantages != 0
    assert int(kept.sum()) == PHI and not (kept & ~MASK.bool()).any()
    assert (kept.int().diff(dim=-1) <= 0).all(), "a response is cut at its end only"
    # groups a: rewards 1, 0 (rows 0, 2); b: rewards 0, 1 (rows 1, 3)
    expected = group_advantages(torch.tensor([[1.0, 0.0]]))[0][[0, 1, 1, 0]]
    assert torch.equal(advantages, torch.where(kept, expected[:, None], 0.0))


@pytest.mark.parametrize(("overrides", "named"), [({"loss_scale_factor": None}, "loss_scale_factor"),
                                                  ({"loss_agg_mode": "token-mean"}, "loss_agg_mode")])
def test_a_missing_phi_or_a_varying_divisor_is_refused(overrides, named):
    old, new, advantages, weights = batch()
    with pytest.raises(ValueError, match=named):
        call(slice(None), actor_config(**overrides), new, old, advantages, weights)
