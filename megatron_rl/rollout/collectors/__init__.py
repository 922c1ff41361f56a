"""Collectors: how to get a step's judged groups. The loop does not know which one is in use."""

from megatron_rl.rollout.collectors.ahead import AheadCollector
from megatron_rl.rollout.collectors.base import BudgetFill, Collector, Ledger, Prompts
from megatron_rl.rollout.collectors.budgeted import BudgetedCollector
from megatron_rl.rollout.collectors.partial import PartialCollector
from megatron_rl.rollout.collectors.partial_agents import PartialAgentsCollector
from megatron_rl.rollout.collectors.synchronous import SyncCollector

__all__ = ["AheadCollector", "BudgetFill", "BudgetedCollector", "Collector", "Ledger", "PartialAgentsCollector",
           "PartialCollector", "Prompts", "SyncCollector"]
