"""Every float key of the schema, at any depth, is a finite number."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_rl.config.load import build, load
from megatron_rl.config.schema import Config


def float_keys(hint: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, plain value that ends in None) of every float under `hint`; names that the user gives are `x`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is float:
        yield path, None
    elif origin in (typing.Union, types.UnionType):
        for option in arguments:
            yield from float_keys(option, path)
    elif origin is tuple:
        for at, value in float_keys(arguments[0], f"{path}[0]"):
            yield at, [value]
    elif origin is dict:
        for at, value in float_keys(arguments[1], f"{path}.x"):
            yield at, {"x": value}
    elif dataclasses.is_dataclass(hint):
        if path.count(".x") > 1 or "mix.x.mix" in path:  # a mixture inside a mixture repeats itself for ever
            return
        for name, field in typing.get_type_hints(hint).items():
            for at, value in float_keys(field, f"{path}.{name}" if path else name):
                yield at, {name: value}


def filled(value: Any, number: float) -> Any:
    """`value` with `number` in the place of None."""
    if isinstance(value, dict):
        return {key: filled(inner, number) for key, inner in value.items()}
    return [filled(value[0], number)] if isinstance(value, list) else number


KEYS = dict(float_keys(Config))


def test_the_list_of_keys_is_whole():
    assert len(KEYS) > 50
    assert {"optimizer.weight_decay", "rollout.temperature", "algo.balance_coef", "algo.loss.kl_coef", "data.weights.x",
            "stages[0].plateau_gain", "eval.benchmarks.x.data.weights.x"} <= KEYS.keys()


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_no_float_may_be_infinite_or_nan(key, number):
    with pytest.raises(ValueError) as refused:
        build(filled(KEYS[key], number))
    assert str(refused.value) == f"{key}={number} must be a finite number"


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", ".inf", "1e400", "1" + 400 * "0"])
def test_no_spelling_of_it_passes_on_the_command_line(text):
    with pytest.raises(ValueError, match=r"optimizer\.weight_decay=.* must be (a finite number|float)"):
        load([f"optimizer.weight_decay={text}"])
