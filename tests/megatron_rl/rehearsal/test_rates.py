"""Rates that somebody measured, in a file."""

from __future__ import annotations

import json

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from megatron_rl.rehearsal.calibrate import calibrate, calibrated, measured_update, seconds_of_operations
from megatron_rl.rehearsal.engines import EngineRates
from megatron_rl.rehearsal.rates import RatesFile, read_rates, write_rates
from megatron_rl.rehearsal.roofline import Rates
from tests.megatron_rl.rehearsal.tiny import NETWORK, WORKLOAD, rehearsed, tiny_config


def test_rates_come_back_as_they_were_written(tmp_path):
    rates = RatesFile("NVIDIA H200", Rates(matrix_share=0.5), EngineRates(overhead_s=0.002), ("ranks.matrix_share",))
    write_rates(str(tmp_path / "h200.json"), rates)
    assert read_rates(str(tmp_path / "h200.json")) == rates
    assert "NVIDIA H200; measured: ranks.matrix_share" in rates.stated()


def test_what_a_file_leaves_out_is_the_default(tmp_path):
    (tmp_path / "card.json").write_text('{"card": "a card", "ranks": {"flops": 1e15}}')
    assert read_rates(str(tmp_path / "card.json")) == RatesFile("a card", Rates(flops=1e15))
    assert read_rates(None) == RatesFile()


@pytest.mark.parametrize(("given", "message"), [
    ([], "expected an object with `card`"), ({"ranks": {}}, "expected an object with `card`"),
    ({"card": "x", "rates": {}}, "rates is none of card, ranks, engine, measured"),
    ({"card": "x", "ranks": {"flop": 1}}, r"ranks\.flop is no rate; there are bandwidth_share, "),
    ({"card": "x", "engine": {"memory": 0}}, r"engine\.memory=0 must be a positive number"),
    ({"card": "x", "ranks": {"flops": "fast"}}, r"ranks\.flops='fast' must be"),
    ({"card": "x", "measured": ["speed"]}, "measured names speed"),
])
def test_other_files_are_refused_by_their_key(given, message, tmp_path):
    (tmp_path / "rates.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=message):
        read_rates(str(tmp_path / "rates.json"))


def test_shares_are_what_was_counted_over_what_was_measured():
    """400 FLOPs in 8 s of 100 a second; 60 bytes in 3 s of 40 a second. Other phases do not count."""
    operations = [{"phase": "update", "name": "aten.mm", "flops": 300, "bytes": 7},
                  {"phase": "update", "name": "megatron_rl.product", "flops": 100, "bytes": 7},
                  {"phase": "update", "name": "aten.add", "flops": 0, "bytes": 60},
                  {"phase": "metrics", "name": "aten.add", "flops": 0, "bytes": 1000}]
    found = calibrated(RatesFile(ranks=Rates(flops=100.0, memory=40.0)), "a card", operations,
                       {"aten.mm": 6.0, "aten.addmm": 2.0, "aten.add": 2.0, "aten.copy_": 1.0})
    assert (found.ranks.matrix_share, found.ranks.bandwidth_share) == (0.5, 0.5)
    assert (found.card, found.measured) == ("a card", ("ranks.matrix_share", "ranks.bandwidth_share"))
    with pytest.raises(ValueError, match="a card was seen to spend 0 s in products"):
        calibrated(RatesFile(), "a card", operations, {"aten.add": 1.0})


def test_a_kernel_counts_once_for_the_operation_that_started_it():
    """As the profiler lists two products on a card: each operation, and its kernel of 5 us as an event of the card.

    The kernel of attention belongs to the operation inside torch's varlen_attn, which counts as a product too.
    """
    events = []
    for place, (name, kernel) in enumerate([("aten::mm", "void cutlass::Kernel2<half>"),
                                            ("aten::_flash_attention_forward", "void pytorch_flash::flash_fwd<64>")]):
        operation = FunctionEvent(2 * place, name, 0, 0, 2, stack=[], use_device="cuda")
        operation.append_kernel(kernel, 0, 5)
        events += [operation, FunctionEvent(2 * place + 1, kernel, 0, 10, 15, stack=[], device_type=DeviceType.CUDA,
                                            use_device="cuda")]
    listed = EventList(events, use_device="cuda")
    listed._build_tree()
    seconds = seconds_of_operations(listed.key_averages(), cuda=True)
    assert seconds == pytest.approx({"aten.mm": 5e-6, "aten._flash_attention_forward": 5e-6})
    counted = [{"phase": "update", "name": "torch_attn._varlen_attn", "flops": 10, "bytes": 1},
               {"phase": "update", "name": "aten.add", "flops": 0, "bytes": 60}]
    found = calibrated(RatesFile(ranks=Rates(flops=1e6)), "a card", counted, seconds | {"aten.add": 1e-6})
    assert found.ranks.matrix_share == pytest.approx(1.0)


def test_an_update_is_measured_by_operation_on_this_machine():
    """On a CPU here, by which a card's share means nothing; the names meet those of the rehearsal."""
    seconds = measured_update(tiny_config(), NETWORK, WORKLOAD)
    assert {"aten.mm", "aten.add"} <= seconds.keys() and all(value > 0 for value in seconds.values())
    found = calibrated(RatesFile(), "this machine", rehearsed(tiny_config())["operations"], seconds)
    assert 0 < found.ranks.matrix_share < 1


def test_a_machine_without_a_gpu_says_what_to_do():
    with pytest.raises(ValueError, match="this machine has none; --rates FILE reads a file"):
        calibrate(tiny_config(), NETWORK, RatesFile())
