"""C3PO (arXiv 2506.14731): a fixed training-token budget per optimiser step, as pure functions on tensors.

Imports torch and the standard library, nothing else. README.md maps each equation to its function.
"""

from c3po.advantage import group_advantages
from c3po.budget import BudgetSelection, select_within_budget, selection_order
from c3po.correction import icepop_weights, mismatch_diagnostics, tis_weights
from c3po.diagnostics import Max, SumCount, masked_sum_count
from c3po.loss import C3POLossConfig, c3po_loss, grpo_loss
from c3po.truncation import soft_overlong_penalty, truncation_keep_mask

__all__ = [
    "BudgetSelection", "C3POLossConfig", "Max", "SumCount", "c3po_loss", "group_advantages", "grpo_loss",
    "icepop_weights", "masked_sum_count", "mismatch_diagnostics", "select_within_budget", "selection_order",
    "soft_overlong_penalty", "tis_weights", "truncation_keep_mask",
]
