"""Rates that somebody measured, in a file."""

from __future__ import annotations

import json

import pytest

from megatron_rl.rehearsal.engines import EngineRates
from megatron_rl.rehearsal.rates import RatesFile, read_rates, write_rates
from megatron_rl.rehearsal.roofline import Rates


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
