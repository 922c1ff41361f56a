"""When two outputs, or two values, are the same."""

import pytest

from megatron_rl.reward.compare import same_output, same_value

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
    ("1", 1, False), (None, 0, False), (None, 0.0, False), (10 ** 400, 1.0, False), ({1}, {1}, True)])
def test_values(found, expected, same):
    assert same_value(found, expected, 1e-6) is same
