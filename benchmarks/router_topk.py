"""Our router in one call against Megatron's eager router with the losses of this project around it.

Forward and backward with balance and z-loss, float32 on a CPU. The Triton path is not timed here: its interpreter is
for correctness.
"""

from __future__ import annotations

from benchmarks import moe_layer, workload
from benchmarks.common import Row, interleaved, main, median
from rl_kernels.router_topk import router_topk


def measure(*, quick: bool, tokens: int, repeats: int) -> tuple[list[Row], dict]:
    config = workload.TINY_MOE if quick else workload.SMALL_MOE | {
        "hidden_size": 2048, "num_experts": 64, "num_experts_per_tok": 6, "head_dim": 64}
    tokens, repeats = (64, 2) if quick else (tokens, repeats)
    layer, network = moe_layer.build(config)
    router, experts, top = layer.router, network.num_experts, network.num_experts_per_tok
    hidden_TH = moe_layer.hidden_states(tokens, network.hidden_size)
    weight_EH = router.weight.detach().clone().requires_grad_()
    router.losses.balance_coef, router.losses.z_coef, router.losses.step_tokens = 0.01, 0.001, float(tokens)
    router.train()

    def megatron() -> None:
        probs_TE, _ = router(hidden_TH[:, None])
        probs_TE.sum().backward()

    def ours() -> None:
        routed = router_topk(hidden_TH, weight_EH, top)
        balance = experts * (routed.counts_E / routed.counts_E.sum() * routed.prob_sums_E).sum() / tokens
        (routed.weights_TK.sum() + 0.01 * balance + 0.001 * routed.z_sum / tokens).backward()

    seconds = interleaved({"megatron": megatron, "ours": ours}, repeats=repeats)
    size = f"{tokens} tokens, top {top} of {experts}, H {network.hidden_size}"
    rows = [Row(f"router_topk (reference) against Megatron's eager router: {size}", median(seconds["ours"]),
                median(seconds["megatron"]), "s")]
    return rows, {"seconds": seconds}


if __name__ == "__main__":
    main("router_topk", measure, tokens=4096, repeats=15)
