"""The benchmarks run, and what they print judges as it says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.__main__ import BENCHMARKS
from benchmarks.common import Row, format_table, interleaved, variation
from tests.sandboxes import needs_sandbox


def test_a_limit_judges_the_ratio_in_its_direction():
    assert Row("x", 3.0, 2.0, "s", 1.5).passed is True
    assert Row("x", 3.1, 2.0, "s", 1.5).passed is False
    assert Row("x", 0.99, None, "", 0.99, "at least").passed is True
    assert Row("x", 0.98, None, "", 0.99, "at least").passed is False
    assert Row("x", 3.0, 2.0).passed is None
    assert "MISSED" in format_table([Row("x", 3.1, 2.0, "s", 1.5)])


def test_functions_take_turns():
    calls = []
    seconds = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, warmup=1)
    assert "".join(calls) == "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_variation_is_the_sample_deviation_over_the_mean():
    assert variation([1.0, 3.0]) == pytest.approx(2 ** 0.5 / 2)  # deviation sqrt(2), mean 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[needs_sandbox] if name == "sandbox" else [])
    for name in (*BENCHMARKS, "ling_lite_slice") if not name.startswith("trl_")])  # need TRL
def test_a_quick_run_prints_its_table_and_misses_nothing_that_is_exact(name):
    result = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--quick"], capture_output=True, text=True,
                            timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "ratio" in result.stdout and "MISSED" not in result.stdout
