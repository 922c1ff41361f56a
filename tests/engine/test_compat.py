"""What SGLang is given on a CPU: a hash, against MurmurHash3 written from its definition; attention and experts of a
batch, against each token alone in float64; and that an engine takes all of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_rl.compat import sglang_cpu_batched as batched
from megatron_rl.compat.sglang_cpu import murmur_hash32
from megatron_rl.rollout.sampling import SamplingParams

WORD = 0xFFFFFFFF


def murmur3_32(words: list[int]) -> int:
    def rotate(value: int, bits: int) -> int:
        return ((value << bits) | (value >> (32 - bits))) & WORD

    state = 0
    for word in words:
        word = rotate(word * 0xCC9E2D51 & WORD, 15) * 0x1B873593 & WORD
        state = (rotate(state ^ word, 13) * 5 + 0xE6546B64) & WORD
    state ^= 4 * len(words)
    state = (state ^ (state >> 16)) * 0x85EBCA6B & WORD
    state = (state ^ (state >> 13)) * 0xC2B2AE35 & WORD
    return state ^ (state >> 16)


def test_reference_agrees_with_a_published_vector():
    """MurmurHash3_x86_32 of the 4 bytes "test" with seed 0."""
    assert murmur3_32([int.from_bytes(b"test", "little")]) == 0xBA6BD213


def test_torch_hash_is_murmur3_of_seed_position_and_column():
    seeds = [0, 1, 2**32 + 5, 2**63 - 1]
    positions = [0, 7, 511, 2**31]
    got = murmur_hash32(torch.tensor(seeds).to(torch.uint64), torch.tensor(positions), torch.arange(6))
    expected = [
        [murmur3_32([seed & WORD, seed >> 32, position, column]) for column in range(6)]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert got.dtype == torch.uint32
    assert got.to(torch.int64).tolist() == expected


LENGTHS = (1, 33, 40, 7, 64, 63)
HEADS, GROUPS, SIZE = 4, 2, 8
NOT_CALLED = None


def decode_case() -> dict[str, torch.Tensor]:
    """Sequences of LENGTHS over shuffled slots. Slot 0 holds NaN, and every token past a sequence's end is there."""
    drawn = torch.Generator().manual_seed(0)
    slots = 1 + torch.randperm(sum(LENGTHS), generator=drawn, dtype=torch.int32)
    req_to_token = torch.zeros(9, 80, dtype=torch.int32)
    requests = torch.tensor([8, 2, 0, 5, 3, 6])
    for request, part in zip(requests, slots.split(LENGTHS), strict=True):
        req_to_token[request, :len(part)] = part
    caches = [torch.randn(1 + len(slots), GROUPS, SIZE, generator=drawn) for _ in range(2)]
    for cache in caches:
        cache[0] = torch.nan
    return {"query": torch.randn(len(LENGTHS), HEADS, SIZE, generator=drawn), "k_cache": caches[0],
            "v_cache": caches[1], "req_to_token": req_to_token, "req_pool_indices": requests,
            "seq_lens": torch.tensor(LENGTHS)}


def each_alone(case: dict[str, torch.Tensor], scaling: float) -> torch.Tensor:
    rows = []
    for query, request, length in zip(case["query"].double(), case["req_pool_indices"], LENGTHS, strict=True):
        slots = case["req_to_token"][request, :length]
        for head in range(HEADS):
            keys, values = (case[name][slots, head * GROUPS // HEADS].double() for name in ("k_cache", "v_cache"))
            rows.append((scaling * keys @ query[head]).softmax(0) @ values)
    return torch.stack(rows).view(len(LENGTHS), HEADS, SIZE)


@pytest.mark.parametrize("group_tokens", [1, 130, 65536])
def test_sequences_attend_together_as_each_alone(monkeypatch, group_tokens):
    monkeypatch.setattr(batched, "GROUP_TOKENS", group_tokens)
    case = decode_case()
    output = torch.zeros_like(case["query"])
    backend = SimpleNamespace(forward_metadata=None)
    batched.batched_decode(NOT_CALLED, backend, output=output, scaling=0.3, **case)
    torch.testing.assert_close(output.double(), each_alone(case, 0.3), rtol=0, atol=1e-6)


def test_a_group_is_less_than_half_padding_and_holds_so_many_tokens(monkeypatch):
    monkeypatch.setattr(batched, "GROUP_TOKENS", 130)
    slots = torch.arange(64, dtype=torch.int32).expand(len(LENGTHS), 64)
    groups = batched.length_groups(list(LENGTHS), slots, torch.float32)
    # 64 and 63; 40 and 33; 7; 1
    assert [group.rows.tolist() for group in groups] == [[4, 5], [2, 1], [3], [0]]
    assert [len(group.slots) for group in groups] == [2 * 64, 2 * 40, 7, 1]
    assert [group.mask is None for group in groups] == [False, False, True, True]


def test_groups_are_found_anew_for_each_step():
    backend = SimpleNamespace(forward_metadata="of the step before")
    batched.forget_groups(None, backend, "forward batch")
    assert backend.forward_metadata is None


def test_sliding_windows_are_left_to_sglang():
    case = decode_case()

    def one_by_one(*args, sliding_window_size, **kwargs):
        return sliding_window_size

    assert batched.batched_decode(one_by_one, SimpleNamespace(forward_metadata=None),
                                  output=torch.zeros_like(case["query"]), sliding_window_size=16, **case) == 16


def experts(width: int) -> SimpleNamespace:
    drawn = torch.Generator().manual_seed(0)
    return SimpleNamespace(num_experts=5, w13_weight=torch.randn(5, 2 * width, 8, generator=drawn),
                           w2_weight=torch.randn(5, 8, width, generator=drawn))


SWIGLU = SimpleNamespace(activation="silu", gemm1_alpha=None, apply_router_weight_on_input=False)
TOKENS = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
CHOICE = (torch.tensor([[0.7, 0.3], [0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]),
          torch.tensor([[4, 0], [0, 2], [2, 4], [0, 4]]), None)  # experts 1 and 3 get nothing


def test_experts_in_groups_are_each_token_alone():
    layer = experts(width=12)
    found = batched.grouped_experts(NOT_CALLED, layer, TOKENS, CHOICE, SWIGLU)
    expected = torch.zeros(4, 8, dtype=torch.float64)
    for token in range(4):
        for weight, expert in zip(CHOICE[0][token].double(), CHOICE[1][token], strict=True):
            gate, up = (layer.w13_weight[expert].double() @ TOKENS[token].double()).chunk(2)
            expected[token] += weight * (layer.w2_weight[expert].double() @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["not aligned", "other activation", "biases"])
def test_other_experts_are_left_to_sglang(case):
    layer = experts(width=10 if case == "not aligned" else 12)  # grouped_mm wants rows of 16 bytes
    config = SimpleNamespace(**{**vars(SWIGLU), "activation": "gelu" if case == "other activation" else "silu"})
    if case == "biases":
        layer.w2_weight_bias = torch.zeros(5, 8)
    assert batched.grouped_experts(lambda *args: "SGLang's", layer, TOKENS, CHOICE, config) == "SGLang's"


def test_an_engine_takes_every_hook(live_engine):
    """SGLang only logs a hook whose target it does not find, and goes on without."""
    live_engine.generate([(5, 6, 7)], SamplingParams(temperature=1.0, max_new_tokens=2))
    assert "Failed to apply hooks" not in live_engine.process.log_path.read_text()
