"""One C3PO step, given once, and the layouts in which it is run; shared by the worker, the reference and the tests.

The sequences are ragged, their numbers of tokens divide nothing, the first layer is dense, the head is a NormHead,
and every term of the loss is large enough that losing it, or a factor of it, changes the gradients in the first digit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from c3po import C3POLossConfig
from megatron_rl.config.kernels import KernelConfig
from tests.tiny_models import write_tiny_bailing

MODEL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "initializer_range": 0.2,
}
LOSS = C3POLossConfig(clip_eps_low=0.2, clip_eps_high=0.3, kl_coef=0.3, entropy_coef=0.2)
SURROGATES = ("gspo", "lpo")
"""Those whose ratio is of many tokens, which one context-parallel rank must hold. LOSS has ppo's."""
TOKENS_PER_SENTENCE = 4
DISTILLED = {"teacher reverse": {"top_k_of": "teacher", "divergence": "reverse"},
             "student forward": {"top_k_of": "student", "divergence": "forward"}}
TOP_K = 5
"""The dense term of algo.distillation. The teacher is the policy without its NormHead."""
PHI = 83
BALANCE_COEF, Z_LOSS_COEF = 0.05, 0.02
TEMPERATURE = 0.8
LEARNING_RATE = 0.05
# eps is of the gradients' size: with the usual 1e-8 AdamW forgets their scale, and a lost factor would not show.
OPTIMIZER = {"lr": 1.0, "beta1": 0.9, "beta2": 0.95, "eps": 0.01, "weight_decay": 0.1, "clip_grad": 0.5}
MICROBATCHES = (1, 2, 5)  # 5 on two data-parallel ranks are more than there are sequences: some are empty
PACK_MULTIPLE = 8  # every layout pads to this, so each run has padding
TOKEN_CAP = 4096
TOLERANCE = 1e-5  # ||a - b|| / ||b|| per parameter; measured: at most 2.6e-6 for gradients, 6.2e-6 for updates

LAYOUTS: dict[str, dict[str, int | str]] = {
    "one": {"world_size": 1},
    "dp2": {"world_size": 2},
    "ep2": {"world_size": 2, "ep": 2},
    "ep2_allgather": {"world_size": 2, "ep": 2, "token_dispatcher": "allgather"},
    "tp2": {"world_size": 2, "tp": 2},
    "tp2_ep2": {"world_size": 2, "tp": 2, "ep": 2},
    "tp2_ep2_allgather": {"world_size": 2, "tp": 2, "ep": 2, "token_dispatcher": "allgather"},
    "tp2_etp2": {"world_size": 2, "tp": 2, "etp": 2},
    "pp2": {"world_size": 2, "pp": 2},
    "pp2_vpp2": {"world_size": 2, "pp": 2, "vpp": 2},
    "cp2": {"world_size": 2, "cp": 2},
    "pp2_ep2": {"world_size": 4, "pp": 2, "ep": 2},
    "tp2_dp2_ep2": {"world_size": 4, "tp": 2, "ep": 2},
    "tp2_pp2_ep2": {"world_size": 4, "tp": 2, "pp": 2, "ep": 2},
    "tp2_cp2_ep2": {"world_size": 4, "tp": 2, "cp": 2, "ep": 2},
    "pp2_ep2_dp4": {"world_size": 8, "pp": 2, "ep": 2},
    "tp2_pp2_cp2_ep2": {"world_size": 8, "tp": 2, "pp": 2, "cp": 2, "ep": 2},
}
UP_TO_FOUR_RANKS = tuple(name for name, sizes in LAYOUTS.items() if sizes["world_size"] <= 4)
VARIANTS = {
    "distributed_optimizer": {"distributed_optimizer": True},
    "overlap": {"distributed_optimizer": True, "overlap": True},
    "recompute": {"distributed_optimizer": False, "recompute": "full"},
    "selective": {"distributed_optimizer": False, "recompute": "selective"},
}
"""Beside the plain optimiser, over whose gradients the layouts are compared. The distributed optimiser holds a reduced
gradient on the rank that owns it only, so for these the weights after one step are compared."""
UPDATE_MICROBATCHES = 2
KERNELS = {
    "megatron": {},
    "reference": {"kernels": KernelConfig(experts="reference", router="reference")},
    "torch": {"backend": "torch"},
    "transformer_engine": {"backend": "transformer_engine"},
    "grouped_mm": {"kernels": KernelConfig(experts="grouped_mm")},
    "triton": {"kernels": KernelConfig(experts="triton", router="triton", logprob="triton", pointwise="triton")},
    "fused": {"kernels": KernelConfig(experts="loop", logprob="fused", pointwise="triton")},
}
"""Keys of `model`. torch is as on a GPU, whose calls and operators a CPU answers (varlen.py, gpu_operators.py).
transformer_engine needs a GPU."""
KERNELS_IN = {"ep2": ("megatron", "reference", "torch"), "ep2_allgather": ("reference",),
              "tp2_ep2": ("reference",), "tp2_etp2": ("reference",), "cp2": ("reference",), "one": ("triton", "fused")}
"""Choices of model.kernels that are held against the same float64 reference, by layout. torch gives its gradients in
every layout (test_gradients.py)."""
INTERPRETED = KERNELS_IN["one"]
"""Triton runs in its interpreter (TRITON_INTERPRET), where one step takes seconds: these make the gradients only."""
MUTATIONS: dict[str, tuple[str, ...]] = {
    "one": ("loss_without_microbatches", "router_scale_without_microbatches", "more_kl", "more_entropy", "wider_clip",
            "larger_phi", "more_balance_loss", "more_z_loss", "padding_is_real", "load_of_each_microbatch",
            "sequences_see_each_other"),
    "dp2": ("loss_without_dp", "router_scale_without_dp", "load_of_own_rank", "step_tokens_of_own_rank"),
    "tp2_ep2": ("norm_gradient_of_own_tokens", "head_scale_of_own_rows", "head_gradient_of_own_vocabulary",
                "load_of_own_rank"),
    "cp2": ("loss_without_cp", "router_scale_with_cp_twice", "load_of_own_rank", "step_tokens_of_own_rank",
            "sequences_cut_in_order", "rotation_by_place_on_the_rank", "key_gradient_of_own_queries",
            "queries_see_every_key"),
}
"""Faults that the worker puts in on purpose (mutations.py), by the layout that must show them."""


BFLOAT16_KERNELS = ("megatron", "torch")
BFLOAT16_MUTATIONS = ("loss_without_microbatches", "more_entropy", "sequences_see_each_other", "loss_without_dp",
                      "head_gradient_of_own_vocabulary", "rotation_by_place_on_the_rank")
"""Faults that must show above the roundings of bfloat16."""


def holds_whole_sequences(layout: str) -> bool:
    return LAYOUTS[layout].get("cp", 1) == 1


def mutations(layout: str) -> tuple[str, ...]:
    return MUTATIONS[layout] if layout in MUTATIONS else ()


def microbatch_multiple(layout: str) -> int:
    """Interleaved stages want a multiple of the pipeline's size: there the planner makes 2, 2 and 6 of 1, 2 and 5."""
    sizes = LAYOUTS[layout]
    return sizes["pp"] if "vpp" in sizes else 1


@dataclass
class Step:
    """One step's data. sequences: token ids int64 [L]; every list has one entry per sequence, arrays are [L].

    routed_experts: int64 [L-1, M, top-k] of each sequence to replay, or None to let the routers choose.
    """

    token_ids: list[np.ndarray] = field(default_factory=list)
    loss_mask: list[np.ndarray] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    old_logprobs: list[np.ndarray] = field(default_factory=list)
    ref_logprobs: list[np.ndarray] = field(default_factory=list)
    routed_experts: list[np.ndarray] | None = None

    @property
    def lengths(self) -> list[int]:
        """Positions of each sequence after the shift."""
        return [len(tokens) - 1 for tokens in self.token_ids]


def draw_sequences(seed: int = 5, num_sequences: int = 9) -> Step:
    """Ragged sequences of 4 to 25 tokens with prompts of 1 to 6; log-probabilities are filled by the reference."""
    rng = np.random.default_rng(seed)
    step = Step()
    for _ in range(num_sequences):
        prompt, response = int(rng.integers(1, 7)), int(rng.integers(3, 20))
        step.token_ids.append(rng.integers(0, MODEL["vocab_size"], prompt + response))
        step.loss_mask.append(np.arange(prompt + response) >= prompt)
        step.advantages.append(float(rng.normal()))
    return step


def write_models(folder: Path) -> dict[bool, Path]:
    """norm_head -> checkpoint folder; the same weights under both."""
    return {norm_head: write_tiny_bailing(folder / f"norm_head_{norm_head}", seed=3, norm_head=norm_head, **MODEL)
            for norm_head in (True, False)}


def relative_error(actual: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """||actual - expected|| / ||scale||, in float64; scale defaults to expected. 0 if both are exactly 0."""
    difference = float((actual.double() - expected.double()).norm())
    size = float((expected if scale is None else scale).double().norm())
    return 0.0 if difference == 0.0 else difference / max(size, 1e-300)


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
