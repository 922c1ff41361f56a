"""C3PO (arXiv 2506.14731): a fixed training-token budget per optimiser step, as pure functions on tensors.

Imports torch and the standard library, nothing else. README.md maps each equation to its function.
"""

from c3po.advantage import group_advantages
from c3po.budget import BudgetSelection, select_within_budget, selection_order
from c3po.correction import icepop_weights, kpop_weights, mismatch_diagnostics, tis_weights, weight_sums
from c3po.diagnostics import Max, SumCount, masked_sum_count
from c3po.distillation import Divergence, distilled_advantages, topk_distillation_loss
from c3po.loss import C3POLossConfig, c3po_loss, grpo_loss, policy_loss
from c3po.normalisation import Normalisation, StepTotals
from c3po.sequence_mask import geometric_mean_mask, token_veto_mask
from c3po.sequences import packed_sequence_ids, padded_sequence_ids
from c3po.surrogate import SurrogateFunction, SurrogateTerms
from c3po.truncation import soft_overlong_penalty, truncation_keep_mask
from c3po.version import __version__

__all__ = [
    "BudgetSelection", "C3POLossConfig", "Divergence", "Max", "Normalisation", "StepTotals", "SumCount",
    "SurrogateFunction", "SurrogateTerms", "__version__", "c3po_loss", "distilled_advantages", "geometric_mean_mask",
    "group_advantages", "grpo_loss", "icepop_weights", "kpop_weights", "masked_sum_count", "mismatch_diagnostics",
    "packed_sequence_ids", "padded_sequence_ids", "policy_loss", "select_within_budget", "selection_order",
    "soft_overlong_penalty", "tis_weights", "token_veto_mask", "topk_distillation_loss", "truncation_keep_mask",
    "weight_sums",
]
