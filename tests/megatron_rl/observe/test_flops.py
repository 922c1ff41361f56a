"""Model FLOPs against hand counts and the published size of Ling-lite."""

from megatron_rl.observe.flops import attention_balance_tokens, forward_flops, linear_flops_per_token, train_flops

LING_LITE = {
    "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 4,
    "vocab_size": 126464, "num_experts": 64, "num_experts_per_tok": 6, "num_shared_experts": 2,
    "moe_intermediate_size": 1408, "intermediate_size": 5632, "first_k_dense_replace": 0,
}
SMALL = {
    "hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 3,
    "vocab_size": 10, "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1,
    "moe_intermediate_size": 5, "intermediate_size": 7, "first_k_dense_replace": 1,
}


def test_half_the_forward_flops_are_the_active_parameters_of_ling_lite():
    embedding = 126464 * 2048  # looked up, not multiplied
    active = linear_flops_per_token(LING_LITE) / 2 + embedding
    assert 2.745e9 < active < 2.76e9  # published: 2.75B active per token


def test_small_network_by_hand():
    # attention 2*4*(2+2)*3 + 2*2*3*4 = 96 + 48 = 144, twice; dense layer 6*4*7 = 168;
    # MoE layer 2*4*8 + 6*4*5*(2+1) = 64 + 360 = 424; head 2*4*10 = 80
    assert linear_flops_per_token(SMALL) == 2 * 144 + 168 + 424 + 80
    # 3 tokens see 1 + 2 + 3 = 6 pairs; each 4*2*3 = 24 in 2 layers
    assert forward_flops(SMALL, [3]) == 3 * 960 + 6 * 24 * 2


def test_attention_costs_as_much_as_the_rest_at_its_balance_length():
    # SMALL: 960 a token against 48 a pair, L/2 pairs a token: L = 2 * 960 / 48
    assert attention_balance_tokens(SMALL) == 40.0


def test_backward_is_twice_forward_and_sequences_add_up():
    assert train_flops(SMALL, [3, 5]) == 3 * (forward_flops(SMALL, [3]) + forward_flops(SMALL, [5]))
    assert forward_flops(SMALL, [8]) > forward_flops(SMALL, [3, 5])  # one sequence sees more pairs


def test_the_layer_behind_the_last_is_a_moe_layer_and_the_head_without_its_gradient():
    # 3 tokens: a MoE layer 144 + 424 and the projection 4*4*4 = 64, forward and twice backward; 6 pairs of 24, the
    # same; the head 80, and 80 backward
    more = 3 * 3 * (144 + 424 + 64) + 3 * 6 * 24 + 3 * 2 * 80
    assert train_flops(SMALL, [3], mtp=True) == train_flops(SMALL, [3]) + more


def test_frozen_matrices_have_no_gradient_of_their_own():
    # 3 tokens: forward 2880 in matrices and 288 in pairs; backward 2880 for inputs of matrices and 576 for pairs
    assert train_flops(SMALL, iter([3]), frozen=True) == 2880 + 288 + 2880 + 576


def test_latent_attention_by_hand():
    latent = SMALL | {"num_key_value_heads": 2, "head_dim": 5, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2,
                      "v_head_dim": 4, "kv_lora_rank": 3, "q_lora_rank": 0}
    # queries 4*2*5 = 40, down 4*(3+2) = 20, up 3*2*(3+4) = 42, output 2*4*4 = 32: 134, times 2
    assert linear_flops_per_token(latent) == 2 * 268 + 168 + 424 + 80
    # queries by way of 6 numbers: 4*6 + 6*2*5 = 84 in the place of 40
    assert linear_flops_per_token(latent | {"q_lora_rank": 6}) == 2 * 356 + 168 + 424 + 80
    # 3 tokens see 6 pairs; each 2*2*(5+4) = 36 in 2 layers
    assert forward_flops(latent, [3]) == 3 * linear_flops_per_token(latent) + 6 * 36 * 2
