"""Values between two sandboxes, or between a sandbox and the judge: JSON, with tags for what JSON does not know.

Only plain values pass. A subclass of int arrives as an int, whatever its == says. `other` decides about other values;
peer.py has it, and the judge has not.
"""

import json
from collections import deque
from decimal import Decimal
from fractions import Fraction

__all__ = ["decode", "encode", "plain", "value_of"]

LONG = 10 ** 4000  # Python refuses to read longer decimal numbers
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}


def encode(value):
    """One line of text. TypeError for a value that is not made of plain ones."""
    return json.dumps(plain(value))


def decode(line):
    """The value again. ValueError, TypeError, ArithmeticError or RecursionError if encode did not write the line."""
    return value_of(json.loads(line))


def plain(value, other=None):
    """Data that json can write. other(value, last): data for a value that is not plain, or None; it is asked first
    (last=False), and again if the value is no kind of a plain one."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return {"int": hex(value)} if abs(value) > LONG else value
    if kind is list:
        return [plain(item, other) for item in value]
    if kind is dict:
        return {"dict": [[plain(key, other), plain(item, other)] for key, item in value.items()]}
    if other is not None and (data := other(value, last=False)) is not None:
        return data
    if isinstance(value, (float, str)):
        return (float if isinstance(value, float) else str).__add__(value, type(value)())
    if isinstance(value, int):
        return plain(int.__index__(value))
    if isinstance(value, dict):
        return plain(dict(value.items()), other)
    for name, sequence in SEQUENCES.items():
        if isinstance(value, sequence):
            items = [plain(item, other) for item in value]
            return items if name == "list" else {name: items}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes" if isinstance(value, bytes) else "bytearray": value.hex()}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, Fraction):
        return {"fraction": str(value)}
    if isinstance(value, Decimal):
        return {"decimal": str(value)}
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return plain(value.tolist(), other)
    if other is not None:
        return other(value, last=True)
    raise TypeError(f"a value of type {kind.__name__} cannot leave the sandbox")


def value_of(data, other=None):
    """The value of plain's data. other(tag, content): the value of a tag that is not of this module."""
    if isinstance(data, list):
        return [value_of(item, other) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError("not a tagged value")
    (tag, content), = data.items()
    if tag == "dict":
        return {value_of(key, other): value_of(item, other) for key, item in content}
    if tag in SEQUENCES:
        return SEQUENCES[tag](value_of(item, other) for item in content)
    if tag == "int":
        return int(content, 16)
    if tag == "complex":
        return complex(*content)
    if tag == "bytes":
        return bytes.fromhex(content)
    if tag == "bytearray":
        return bytearray.fromhex(content)
    if tag == "range":
        return range(*content)
    if tag == "fraction":
        return Fraction(*map(int, str(content).split("/")))  # 1e999999999 would take minutes
    if tag == "decimal":
        return Decimal(content)
    if other is not None:
        return other(tag, content)
    raise ValueError(f"no such tag: {tag}")
