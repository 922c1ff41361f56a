"""When two outputs, or two values, are the same."""

import time
from decimal import Decimal
from fractions import Fraction

import pytest

from megatron_rl.reward.calls import read_values
from megatron_rl.reward.compare import same_output, same_value
from megatron_rl.reward.harness import wire

NAN = float("nan")


@pytest.mark.parametrize(("found", "expected", "same"), [
    ("3\n", "3", True), ("1 2\n3", " 1\t2 3 \n\n", True), ("", "", True), ("", "0", False), ("1 2", "12", False),
    ("0.3333333", "0.33333333", True), ("0.333", "0.33333333", False), ("1e3", "1000.0", True),
    ("1000", "1000.0", True),
    ("1000.0", "1000", False), ("100000001", "100000000", False), ("yes", "YES", False), ("nan", "1.0", False),
    ("1.0 x", "1.0", False), ("1_0.0", "10.0", False)])
def test_outputs(found, expected, same):
    assert same_output(found, expected, 1e-6) is same


@pytest.mark.parametrize(("found", "expected", "same"), [
    (3, 3, True), (3.0, 3, True), ((1, 2), [1, 2], True), ([1, [2.0000000001]], [1, [2.0]], True),
    ([1], [1, 1], False),
    ({"a": (1,)}, {"a": [1]}, True), ({"a": 1}, {"b": 1}, False), (NAN, NAN, True), (NAN, 1.0, False),
    (1.0, NAN, False),
    (True, 1, False), (1, True, False), (True, True, True), (1.0, True, False), (True, 1.0, False),
    (3.0000001, 3, False),
    (2 ** 53, 2 ** 53 + 1, False), (float(2 ** 53), 2 ** 53 + 1, False), ([True], [1], False), ({1: 2}, {"1": 2}, True),
    ({1: 2, "1": 2}, {"1": 2}, False), ({1: 3}, {"1": 2}, False), ("3", 3, False), (3, "3", False), (3, 3.0, True),
    ("1", 1, False), (None, 0, False), (None, 0.0, False), (10 ** 400, 1.0, False), ({1}, {1}, True),
    (Decimal("sNaN"), 1, False), ([Decimal("sNaN")], [1], False), ({10 ** 5000: 1}, {"1": 1}, False),
    (Fraction(1, 2), 0.5, True), (Decimal("0.5"), 0.5, True), (Fraction(10 ** 400), 0.5, False),
    (Decimal("sNaN"), 0.5, False), (Decimal("NaN"), NAN, True), (Decimal("1e999"), 0.5, False)])
def test_values(found, expected, same):
    assert same_value(found, expected, 1e-6) is same


@pytest.mark.parametrize("value", [
    {"fraction": "1/0"}, {"fraction": "1/2/3"}, {"fraction": 1e999}, {"fraction": "1e99999999"}, {"decimal": "x"},
    {"decimal": "1e99999999999999999999"}, {"complex": [10 ** 400, 0]}, {"range": [0, 1, 0]}, {"set": 5}, {"int": 5}])
def test_a_forged_value_ends_the_answers_and_breaks_no_judge(value):
    lines = [wire.encode({"ok": Fraction(-1, 2)}), wire.json.dumps({"dict": [["ok", value]]}), wire.encode({"ok": 1})]
    assert read_values("\n".join(lines).encode()) == [{"ok": Fraction(-1, 2)}]


def test_a_long_word_is_compared_in_a_moment():
    began = time.process_time()
    assert not same_output("1" * 40_000 + "x", "0.5", 1e-6)
    assert time.process_time() - began < 5.0  # a cost that grows with the square of the length takes half a minute
