"""Experts that were chosen before and are taken again: routing replay (R3), recorded by the engine or by the trainer.

A micro-batch's record travels in packed_seq_params (attention.PackedSequences), which Megatron hands to every layer's
forward and which a checkpointed layer keeps for its second forward (transformer_block.checkpointed_forward). So each
layer meets the record of the micro-batch at hand, however many are in flight (1F1B, interleaved stages) and when the
backward pass runs the layer again. Megatron's own RouterReplay is one process-global target per layer; `LayerReplay`
takes its place in the seam that it left (moe_utils.topk_routing_with_score_function, megatron-core 0.19.2).

Only the choice is replayed: gate values are computed from the live logits, so the router keeps its gradient.
Letters: T positions of a micro-batch on this rank, t of them in its slice under sequence parallelism, M MoE layers of
the whole network, k experts per token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer


@dataclass
class MicrobatchRouting:
    """The experts of one micro-batch during one pass, and how often each layer asked for them.

    experts: uint8 or int16 [T, M, k], written where `recording`, read elsewhere; real: bool [T], False on padding;
    rows: this rank's slice of T. differing, choices: how many of the real tokens' replayed choices the live router
    would not have made, of how many, counted when a layer asks first (fp32 []).
    """

    experts: torch.Tensor
    real: torch.Tensor
    rows: slice
    recording: bool = False
    uses: Counter[int] = field(default_factory=Counter)
    differing: torch.Tensor = field(init=False)
    choices: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.differing = self.choices = torch.zeros((), device=self.experts.device)

    def choose(self, layer: int, live: torch.Tensor) -> torch.Tensor:
        """int64 [t, k]: the experts of MoE layer `layer` (from 0), given those that the live router takes."""
        self.uses[layer] += 1
        experts = self.experts[self.rows, layer]
        if self.recording:
            experts.copy_(live)
            return live
        replayed = experts.long()
        if self.uses[layer] == 1:
            missed = (replayed[:, :, None] != live[:, None, :]).all(-1)
            real = self.real[self.rows, None]
            self.differing = self.differing + (missed & real).sum().float()
            self.choices = self.choices + real.sum().float() * live.shape[1]
        return replayed

    def check_used(self, layers: Iterable[int], times: int) -> None:
        """Every record of these layers was taken exactly `times` times, and no other."""
        expected = Counter(dict.fromkeys(layers, times))
        assert self.uses == expected, f"routing records were used {dict(self.uses)} times by MoE layer, not {expected}"


class LayerReplay:
    """What a router asks for its top k; `microbatch` is set at the start of each forward of its layer.

    experts_ranking_a_group: a group of experts is as good as the sum of so many of its best ones. Megatron would take
    the sum of topk / group_topk (moe_utils.group_limited_topk), which no published model does.
    """

    def __init__(self, experts_ranking_a_group: int = 1):
        self.experts_ranking_a_group = experts_ranking_a_group
        self.moe_layer = 0
        self.microbatch: MicrobatchRouting | None = None

    def get_replay_topk(self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        """(scores of the chosen experts, their numbers), both [t, k], as Megatron's RouterReplay.get_replay_topk."""
        allowed = self._in_best_groups(scores, num_groups, group_topk) if group_topk else scores
        live_scores, live = default_compute_topk(allowed, topk)
        if self.microbatch is None:
            return live_scores, live
        chosen = self.microbatch.choose(self.moe_layer, live)
        return scores.gather(1, chosen), chosen

    def _in_best_groups(self, scores, num_groups: int, group_topk: int) -> torch.Tensor:
        """scores [t, E], and -inf for experts of other groups than the best."""
        by_group = scores.unflatten(-1, (num_groups, -1))
        ranks = by_group.topk(self.experts_ranking_a_group, -1).values.sum(-1)
        best = torch.zeros_like(ranks, dtype=torch.bool).scatter(-1, ranks.topk(group_topk, -1).indices, True)
        return by_group.masked_fill(~best[..., None], float("-inf")).flatten(1)


MADE_ONCE = ("sort_input_by_local_experts", "restore_output_by_local_experts")
"""Tensors that a dispatcher has from its construction on."""


class RoutedMoELayer(MoELayer):
    """Router and experts of one layer. It keeps nothing of a micro-batch after the forward pass.

    Megatron-Core 0.19.2's dispatcher keeps the router's probabilities, whose graph holds all of the layer, until the
    layer's next forward (transformer/moe/token_dispatcher.py: dispatch_preprocess; Megatron-LM issue 3221). Delete
    `forget` when it lets go of them.
    If the layer is recomputed by itself (model.recompute_modules: moe), the second forward meets the record of the
    micro-batch that the first was about. Megatron's own checkpoint around the layer does not know of records.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.checkpointed, self.moe_layer_recompute = self.moe_layer_recompute, False

    def forward(self, hidden_states, intermediate_tensors=None, padding_mask=None):
        if not (self.checkpointed and self.training):
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        record = self.router.router_replay.microbatch

        def run(hidden_states, padding_mask):
            self.router.router_replay.microbatch = record
            try:
                return super(RoutedMoELayer, self).forward(hidden_states, None, padding_mask)
            finally:
                self.forget()

        return tensor_parallel.checkpoint(run, False, hidden_states, padding_mask)

    def forget(self) -> None:
        self.router.router_replay.microbatch = None
        for name, value in list(vars(self.token_dispatcher).items()):
            if isinstance(value, torch.Tensor) and name not in MADE_ONCE:
                setattr(self.token_dispatcher, name, None)


class RoutedTransformerLayer(TransformerLayer):
    """A layer with experts, whose router follows the micro-batch that this forward is about."""

    def forward(self, *args, **kwargs):
        self.mlp.router.router_replay.microbatch = kwargs["packed_seq_params"].routing
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.mlp.forget()
