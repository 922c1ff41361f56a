"""model.backend=transformer_engine without a GPU: Transformer Engine's layers on a pretended one (te_ranks.py).

They are built, loaded, exported, and their training state goes through checkpoints. Its kernels do not run, but for
attention: there its own forward runs up to the kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import sha256
from tests.distributed.conftest import run_worker
from tests.gpu.te_cases import LAYOUTS, RESTORED_IN, TRAVELLERS, network_of, networks_in, write_model

if not os.environ.get("TE_FOLDER") and importlib.util.find_spec("transformer_engine") is None:
    pytest.skip("Transformer Engine is not installed", allow_module_level=True)
pytestmark = pytest.mark.slow

IN_LAYOUTS = [(layout, name) for layout in LAYOUTS for name in networks_in(layout)]
TRAVELLING = [(layout, name) for layout, name in IN_LAYOUTS if name in TRAVELLERS]
OTHER = {"torch": "transformer_engine", "transformer_engine": "torch"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the ranks wrote, one start of them for each number of ranks; the checkpoints in folder/NAME."""
    folder = tmp_path_factory.mktemp("transformer_engine")
    for name in networks_in("one"):
        write_model(folder, name)
    for size in (1, 2):
        run_worker(("tests.gpu.te_worker",), folder, size,
                   [layout for layout, sizes in LAYOUTS.items() if sizes["world_size"] == size])
    return folder


@functools.cache
def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


def ranks(folder: Path, layout: str, name: str) -> list[dict[str, Any]]:
    return [read(folder / f"{layout}.{name}.{rank}.pt") for rank in range(LAYOUTS[layout]["world_size"])]


@pytest.mark.parametrize(("layout", "name"), IN_LAYOUTS)
def test_a_checkpoint_comes_back_of_both_backends(folder, tmp_path, layout, name):
    """Equal by sha256 to the file that was read, and nothing beside it."""
    expected = {tensor: sha256(value) for tensor, value in write_model(tmp_path, name).items()}
    first = ranks(folder, layout, name)[0]
    for backend in OTHER:
        assert first[backend]["loaded"] == expected


@pytest.mark.parametrize(("layout", "name"), IN_LAYOUTS)
def test_parameters_and_optimiser_groups_do_not_depend_on_the_backend(folder, layout, name):
    """Shape, dtype, decay, and what Megatron reads of a parameter when it reduces gradients and takes their norm."""
    for rank in ranks(folder, layout, name):
        marks = rank["transformer_engine"]["marks"]
        assert marks and marks == rank["torch"]["marks"]
        decay = {mark["shape"]: {weight_decay for _, weight_decay, _ in mark["group"]} for mark in marks.values()}
        assert all(found == ({0.1} if len(shape) > 1 else {0.0}) for shape, found in decay.items())


@pytest.mark.parametrize(("layout", "name"), IN_LAYOUTS)
def test_layers_are_transformer_engines_with_our_router(folder, layout, name):
    for rank in ranks(folder, layout, name):
        layers, network = rank["transformer_engine"]["layers"], network_of(name)
        assert len(layers) == network.num_hidden_layers // LAYOUTS[layout].get("pp", 1)
        for layer in layers:
            assert "PackedTEAttention" in layer and "TELayerNormColumnParallelLinear" in layer
            assert ("(q_layernorm): RMSNorm" in layer) is network.qk_norm
            if layer.startswith("RoutedTransformerLayer"):
                assert "TEGroupedMLP" in layer and "BudgetRouter" in layer
            assert " ColumnParallelLinear" not in layer and "SequentialMLP" not in layer
        assert network.num_experts == 0 or any(layer.startswith("RoutedTransformerLayer") for layer in layers)


@pytest.mark.parametrize("backend", OTHER)
@pytest.mark.parametrize(("layout", "name"), TRAVELLING)
def test_a_checkpoint_of_one_backend_is_restored_under_the_other(folder, layout, name, backend):
    """Weights, master weights, moments and the step, every element on every rank. torch's own Adam on one side,
    Transformer Engine's on the other."""
    for rank in ranks(folder, layout, name):
        before, after = rank[backend]["before"], rank[backend]["after"]
        assert before["steps"] == 3 and len(before["exp_avg"]) == len(rank[backend]["marks"])
        assert after == before
        assert before["exp_avg"] != rank[OTHER[backend]]["before"]["exp_avg"]  # there was something to restore


@pytest.mark.parametrize("backend", OTHER)
@pytest.mark.parametrize("name", TRAVELLERS)
@pytest.mark.parametrize(("source", "layout"), RESTORED_IN.items())
def test_another_backend_in_another_layout_restores_what_the_same_one_would(folder, source, layout, name, backend):
    if name not in networks_in(layout):
        assert not network_of(name).num_experts
        return
    for rank in ranks(folder, layout, name):
        elsewhere = rank[backend]["elsewhere"]
        assert elsewhere["torch"] == elsewhere["transformer_engine"]
        assert elsewhere["torch"]["steps"] == 3


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout, name in TRAVELLING
                                              if "pp" not in LAYOUTS[layout]])
def test_attention_is_called_with_what_transformer_engine_asks_for(folder, layout, name):
    for rank in ranks(folder, layout, name):
        seen, sizes = rank["attention"], LAYOUTS[layout]
        network, tp, cp = network_of(name), sizes.get("tp", 1), sizes.get("cp", 1)
        bounds = [0]
        for span in seen["spans"]:
            assert span % (2 * cp) == 0 or cp == 1  # each rank holds two chunks of every sequence
            bounds.append(bounds[-1] + span)
        assert bounds[-1] == seen["tokens"] * cp
        assert seen["bounds"] == [bounds] * 4
        assert seen["max_seqlen_q"] == seen["max_seqlen_kv"] == max(seen["spans"])
        assert (seen["attn_mask_type"], seen["qkv_layout"]) == ("padding_causal", "thd_thd_thd")
        assert seen["pad_between_seqs"] is False and seen["allowed"] == ["FUSED"]
        heads = {"q": network.num_attention_heads, "k": network.num_key_value_heads, "v": network.num_key_value_heads}
        for tensor, count in heads.items():
            assert seen["tensors"][tensor] == {"shape": (seen["tokens"], count // tp, network.head_dim),
                                               "dtype": torch.bfloat16, "device": "cuda"}
        for tensor in ("cu_seqlens_q", "cu_seqlens_kv"):
            assert seen["tensors"][tensor] == {"shape": (len(bounds),), "dtype": torch.int32, "device": "cuda"}
        assert (seen["equal"], seen["cp_ranks"]) == ((True, None) if cp == 1 else (None, [0, 1]))


@pytest.mark.parametrize(("layout", "name"), IN_LAYOUTS)
def test_a_gpu_would_refuse_nothing(folder, layout, name):
    assert [rank["findings"] for rank in ranks(folder, layout, name)] == [[]] * LAYOUTS[layout]["world_size"]
