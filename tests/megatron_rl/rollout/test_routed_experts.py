"""The experts that an engine reports, narrowed to bytes: worked by hand, and refused when they cannot be true."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from megatron_rl.rollout.routed_experts import RoutedLayers

LAYERS = RoutedLayers(num_layers=3, moe_layers=(1, 2), top_k=2, num_experts=256)  # the first of 3 layers is dense
# two positions of a sequence of three tokens; SGLang reports zeros for the dense layer
REPORTED = [[[0, 0], [255, 1], [2, 3]], [[0, 0], [4, 5], [7, 6]]]


def encode(experts) -> str:
    return base64.b64encode(np.asarray(experts, dtype=np.int32).tobytes()).decode()


def test_only_moe_layers_are_kept_in_one_byte_each():
    decoded = LAYERS.decode(encode(REPORTED), num_tokens=3)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous, "it is broadcast as bytes"
    assert decoded.tolist() == [[[255, 1], [2, 3]], [[4, 5], [7, 6]]]


@pytest.mark.parametrize("wrong", [256, -1, 5], ids=["no such expert", "masked", "twice"])
def test_a_token_without_top_k_experts_of_the_model_is_refused(wrong):
    experts = np.asarray(REPORTED)
    experts[1, 1, 0] = wrong
    with pytest.raises(ValueError, match="not 2 different experts of 256"):
        LAYERS.decode(encode(experts), num_tokens=3)


def test_an_array_of_another_length_is_refused():
    with pytest.raises(ValueError, match="12 entries"):
        LAYERS.decode(encode(REPORTED), num_tokens=4)


def test_models_that_do_not_fit_are_refused_with_the_way_around():
    with pytest.raises(ValueError, match="algo.router_replay=trainer"):
        RoutedLayers(num_layers=1, moe_layers=(0,), top_k=8, num_experts=257)
    with pytest.raises(ValueError, match="algo.router_replay=none"):
        RoutedLayers(num_layers=1, moe_layers=(), top_k=0, num_experts=0)
