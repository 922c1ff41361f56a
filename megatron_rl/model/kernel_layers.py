"""Megatron's router and experts with the arithmetic of rl_kernels in the middle; parameters and interfaces are theirs.

Router and experts are subclasses that replace one forward: names, shapes and sharding of the parameters, and with them
checkpoints, conversion, publishing and gradient buffers, do not know which of the two ran. The layer around them keeps
the experts' row counts on the device if the experts can.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_rl.model.router import BudgetRouter
from megatron_rl.model.routing_replay import RoutedMoELayer
from rl_kernels.grouped_experts import LowRank, sorted_experts
from rl_kernels.pointwise import weighted_swiglu
from rl_kernels.router_topk import router_topk


class DeviceCountsMoELayer(RoutedMoELayer):
    """A RoutedMoELayer whose all-to-all dispatcher is DeviceCounts."""

    def __init__(self, config, *args, pg_collection=None, **kwargs):
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        if config.moe_token_dispatcher_type == "alltoall":
            self.token_dispatcher = DeviceCounts(self.num_local_experts, self.local_expert_indices, config=self.config,
                                                 pg_collection=pg_collection)


class DeviceCounts(MoEAlltoAllTokenDispatcher):
    """The all-to-all dispatcher, whose counts of rows by expert stay on the device.

    One rank that holds all experts whole has its rows sorted by the first permutation, so the host reads nothing. Among
    several ranks the host reads how many rows they exchange, once a layer, which all-to-all asks for.
    """

    @property
    def alone(self) -> bool:
        return self.ep_size == self.tp_size == 1

    def _maybe_dtoh_and_synchronize(self, point, tokens_per_expert=None):
        if not self.alone:
            super()._maybe_dtoh_and_synchronize(point)
        return tokens_per_expert

    def dispatch_postprocess(self, global_input_tokens, global_probs):
        if not self.alone:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        counts_E, self.tokens_per_expert = self.tokens_per_expert, None
        return global_input_tokens, counts_E, global_probs

    def combine_preprocess(self, hidden_states):
        return hidden_states if self.alone else super().combine_preprocess(hidden_states)


class KernelExperts(SequentialMLP):
    """The experts of one rank through sorted_experts; each expert's two matrices stay parameters of their own.

    Under expert tensor parallelism the dispatcher gathers rows and adds partial outputs, so a rank's slice of each
    matrix is all that its products need.
    """

    def __init__(self, *args, impl: str, pointwise: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.impl, self.pointwise = impl, pointwise

    def forward(self, permuted_local_hidden_states, tokens_per_expert, permuted_probs):
        """(output [N, H], None): rows sorted by expert, int64 [E] rows of each, and their routing weights fp32 [N]."""
        matrices = [[getattr(expert, name).weight for expert in self.local_experts]
                    for name in ("linear_fc1", "linear_fc2")]
        return sorted_experts(permuted_local_hidden_states, *matrices, tokens_per_expert, permuted_probs,
                              impl=self.impl, pointwise=self.pointwise,
                              gate_up_adapter=self._adapter("linear_fc1"),
                              down_adapter=self._adapter("linear_fc2")), None

    def _adapter(self, name: str) -> LowRank | None:
        """Those of model/lora.py beside the linears `name`, unless they are off."""
        found = [getattr(expert, name).lora for expert in self.local_experts if hasattr(getattr(expert, name), "lora")]
        if not found or not found[0].adapters.on:
            return None
        pairs = [adapter.matrices() for adapter in found]
        return LowRank([a for a, _ in pairs], [b for _, b in pairs], found[0].scale)


class SwiGLU(torch.nn.Module):
    """The activation of a dense layer and of shared experts in one kernel: Megatron asks for a module to put its own
    products around (MLPSubmodules.activation_func)."""

    def __init__(self, *, config):
        super().__init__()
        del config

    def forward(self, gate_up):
        """[..., F] of [..., 2F]."""
        return weighted_swiglu(gate_up.flatten(0, -2), impl="triton").view(*gate_up.shape[:-1], -1)


class KernelRouter(BudgetRouter):
    """BudgetRouter whose logits, choice, weights and sums come from one call of router_topk.

    Megatron's part that stays: the losses ride on the weights' gradient (MoEAuxLossAutoScaler), and the dispatcher
    wants weights and choice as [T, E].
    """

    def __init__(self, *args, impl: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.impl = impl

    def forward(self, input, padding_mask=None):
        """(probs fp32, routing_map bool), both [T, E]; input [T, 1, H], padding_mask True = padding."""
        hidden_TH = input.reshape(-1, input.shape[-1])
        route = partial(router_topk, hidden_TH, self.weight, self.topk, impl=self.impl,
                        normalize=not self.config.moe_router_pre_softmax,
                        real_T=self._real(padding_mask, hidden_TH)[:, 0].bool())
        routed = route(indices_TK=self._replayed(route))
        empty_TE = hidden_TH.new_zeros(len(hidden_TH), self.num_experts, dtype=routed.weights_TK.dtype)
        probs_TE = empty_TE.scatter(1, routed.indices_TK, routed.weights_TK)
        return self._account(probs_TE, routed), empty_TE.bool().scatter(1, routed.indices_TK, True)

    def _replayed(self, route) -> torch.Tensor | None:
        """The recorded choice of this micro-batch, which is compared with the one that the router would make."""
        record = self.router_replay.microbatch
        if record is None:
            return None
        with torch.no_grad():
            live = route().indices_TK
        return record.choose(self.router_replay.moe_layer, live)
