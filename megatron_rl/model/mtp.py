"""The layer behind the last, for multi-token prediction: it reads a trunk that it does not move.

At position t it gets the trunk's normalised state and the embedding of token t+1, and predicts token t+2 with the
trunk's head (arXiv 2412.19437 Sec. 2.2; the order of both halves as in SGLang 0.5.23, models/bailing_moe_nextn.py).
State, embedding and head come detached, and gradients, buffers and optimiser are its own (Policy.mtp_chunk), so the
trunk's update does not depend on this layer by a bit.

Megatron's MultiTokenPredictionLayer is not used. It stands in the model's own gradient buffers, and so in its norm for
clipping, and adds its loss to the states of the trunk (process_mtp_loss, megatron-core 0.19.2). Its shift of packed
sequences (roll_tensor) keeps to their bounds, as batch/pack.py does here, which also shifts under context parallelism.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from torch import nn

from megatron_rl.model.attention import PackedSequences
from megatron_rl.model.backend import Backend
from megatron_rl.model.network import Network
from megatron_rl.model.router import RouterLosses
from megatron_rl.model.spec import RMSNorm, layer_spec


class MultiTokenPrediction(nn.Module):
    """The layer, on every rank as any other layer lies there. Its router has no losses, and its bias stays as it is."""

    def __init__(self, network: Network, config: TransformerConfig, backend: Backend):
        super().__init__()
        self.config, hidden = config, config.hidden_size
        self.enorm, self.hnorm, self.final_layernorm = (
            RMSNorm(config, hidden, config.layernorm_epsilon) for _ in range(3))
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False, dtype=config.params_dtype)
        self.eh_proj.weight.sequence_parallel = config.sequence_parallel  # each rank has its rows; Megatron adds
        self.layer = build_module(layer_spec(network, network.num_hidden_layers, RouterLosses(), backend),
                                  config=config, layer_number=network.num_hidden_layers + 1, is_mtp_layer=True)

    def forward(self, embedded: torch.Tensor, states: torch.Tensor, packed: PackedSequences,
                padding_mask: torch.Tensor) -> torch.Tensor:
        """What the head reads, [t, 1, H]; embedded, states [t, 1, H], padding_mask bool [1, t] of this rank's rows."""
        mixed = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(states)], -1))
        mixed, _ = self.layer(hidden_states=mixed, attention_mask=None, packed_seq_params=packed,
                              padding_mask=padding_mask)
        return self.final_layernorm(mixed)
