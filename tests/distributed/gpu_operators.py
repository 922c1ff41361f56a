"""A CPU's kernels for the operators of rl_kernels that run Triton's on a GPU: the same mathematics, in plain torch.

Whoever imports this module takes a step on a CPU as the torch backend does on a GPU. That Triton's kernels compute the
same is shown in tests/kernels, so import it only where those do not run: in processes of ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rl_kernels.linear_logprob import fused
from rl_kernels.pointwise import op as pointwise


def _halves(gate_up, weights):
    gate, up = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in gate_up.chunk(2, -1))
    return gate, up, torch.ones(len(gate), 1, dtype=gate.dtype) if weights is None else weights.to(gate.dtype)


@pointwise.swiglu_op.register_kernel("cpu")
def swiglu(gate_up, weights):
    gate, up, weight = _halves(gate_up, weights)
    return (F.silu(gate) * up * weight).to(gate_up.dtype)


@pointwise.swiglu_gradients_op.register_kernel("cpu")
def swiglu_gradients(grad, gate_up, weights):
    gate, up, weight = _halves(gate_up, weights)
    grad, sigmoid = grad.to(gate.dtype), gate.sigmoid()
    silu = gate * sigmoid
    grad_weights = (grad * silu * up).sum(1, keepdim=True)
    both = torch.cat([grad * weight * up * sigmoid * (1 + gate - silu), grad * weight * silu], -1)
    return both.to(gate_up.dtype), grad_weights if weights is not None else grad_weights[:0]


@pointwise.rotated_op.register_kernel("cpu")
def rotated(heads, cosine, sine, back):
    return pointwise.rotate(heads, cosine, -sine if back else sine).contiguous()


@fused.logit_statistics.register_kernel("cpu")
def logit_statistics(logits, local, inverse_temperature, with_entropy):
    z, owned, index = _label(logits * inverse_temperature, local)
    maximum = z.amax(1)
    shifted = z - maximum[:, None]
    exp = shifted.exp()
    dot = (exp * shifted).sum(1) if with_entropy else torch.zeros_like(maximum)
    return torch.stack([maximum, exp.sum(1), dot, torch.where(owned, z.gather(1, index)[:, 0], 0.0)])


@fused.logit_gradients.register_kernel("cpu")
def logit_gradients(logits, local, lse, entropy, g_logprob, g_entropy, inverse_temperature, dtype):
    z, owned, index = _label(logits * inverse_temperature, local)
    logp = z - lse[:, None]
    slope = g_logprob[:, None] if g_entropy is None else \
        g_logprob[:, None] + g_entropy[:, None] * (logp + entropy[:, None])
    gradient = (-logp.exp() * slope).scatter_add(1, index, torch.where(owned, g_logprob, 0.0)[:, None])
    gradient *= inverse_temperature
    if dtype == gradient.dtype:
        return [gradient]
    high = gradient.to(dtype)
    return [high, (gradient - high).to(dtype)]


def _label(logits, local):
    """(logits, bool: the label is in this block, its column [C, 1], 0 where it is not)."""
    owned = (local >= 0) & (local < logits.shape[1])
    return logits, owned, torch.where(owned, local, 0).long()[:, None]
