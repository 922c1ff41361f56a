"""The benchmarks run, and what they print judges as it says."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from benchmarks import floors
from benchmarks.__main__ import BENCHMARKS, ON_A_GPU
from benchmarks.common import Row, format_table, interleaved, variation
from tests.card.place import Place
from tests.distributed.conftest import REPOSITORY
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


def test_the_floors_are_those_of_the_page():
    """Milliseconds of operations and of bytes of each line, in its order."""
    page = (REPOSITORY / "docs" / "performance.md").read_text()
    lines = re.findall(r"^\| (\w+)[^|]* \| ([\d,]+) tokens, [^|]* \| ([\d.]+) ms \| ([\d.]+) ms \|$", page, re.M)
    cases = floors.cases(quick=False)
    assert len(lines) == len(cases) == 4
    for (name, tokens, operations, transferred), case in zip(lines, cases, strict=True):
        assert case.name.startswith(name) and f" {tokens.replace(',', '')} tokens" in case.name
        assert 1e3 * case.operations / floors.MATRIX_RATE == pytest.approx(float(operations), rel=0.15, abs=0.05)
        assert 1e3 * case.bytes / floors.BANDWIDTH == pytest.approx(float(transferred), rel=0.03)


@pytest.mark.slow
def test_kernels_are_measured_against_their_floors():
    """On the pretended GPU, with Triton's interpreter: each implementation of each operation gives a row."""
    printed = Place("pretended").run("benchmarks.floors", "--quick", TRITON_INTERPRET="1")
    rows = [line for line in printed.splitlines() if " ms " in line]
    assert len(rows) == sum(len(case.implementations) for case in floors.cases(quick=True)) == 11


@pytest.mark.parametrize("command", [("benchmarks", "--gpu"), *((f"benchmarks.{name}",) for name in ON_A_GPU)])
def test_what_needs_a_gpu_stops_with_one_line_where_there_is_none(command):
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", *command], capture_output=True, text=True, timeout=300,
                          cwd=REPOSITORY)
    lines = [line for line in done.stderr.splitlines() if "torch sees none" in line]
    assert done.returncode == 1 and len(lines) == 1 and "CUDA device" in lines[0]
    assert "Traceback" not in done.stderr and not done.stdout
