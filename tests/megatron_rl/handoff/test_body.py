"""Values with arrays among them come back equal, from bytes that depend on nothing else."""

import numpy as np
import pytest

from megatron_rl.handoff import dump, load

VALUE = {"step": 3, "open": [{"ids": np.arange(5, dtype=np.int32), "text": "\u00e9\"\\", "score": None},
                             {"ids": np.zeros(0, dtype=np.float32), "nested": [[1.5, -0.0, float("inf")], True]}],
         "experts": np.arange(24, dtype=np.uint8).reshape(4, 3, 2)[::2], "mask": np.array([True, False])}


def same(one, other) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_value_comes_back_and_its_arrays_may_be_written_to():
    found = load(dump(VALUE))
    assert same(VALUE, found)
    assert found["open"][0]["ids"].flags.writeable


def test_equal_values_are_equal_bytes():
    assert dump(VALUE) == dump(load(dump(VALUE)))
    assert load(dump([])) == [] and load(dump({"a": 1})) == {"a": 1}


@pytest.mark.parametrize("spoil", [lambda body: body[:len(body) // 2], lambda body: b"", lambda body: b"{}" + body,
                                   lambda body: b"<html>no such page</html>"])
def test_what_is_no_whole_body_is_refused(spoil):
    with pytest.raises(ValueError, match="not a safetensors body"):
        load(spoil(dump(VALUE)))
