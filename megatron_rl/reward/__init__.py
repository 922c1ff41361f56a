"""Rewards: domain -> scorer, run in worker processes with a hard time limit."""

from megatron_rl.reward.base import Job, Scorer
from megatron_rl.reward.pool import RewardPool
from megatron_rl.reward.route import Routes

__all__ = ["Job", "RewardPool", "Routes", "Scorer"]
