"""Values between a tester and a solution in two sandboxes: JSON, with tags for what JSON does not know.

Only plain values pass. An object whose == always says yes arrives as an error, a subclass of int as the int.
"""

import json

__all__ = ["decode", "encode"]

LONG = 10 ** 4000  # Python refuses to read longer decimal numbers


def encode(value):
    """One line of text. TypeError for a value that is not made of plain ones."""
    return json.dumps(_plain(value))


def decode(line):
    """The value again. ValueError or RecursionError if the line is none of encode's."""
    return _value(json.loads(line))


def _plain(value):
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return {"int": hex(value)} if abs(value) > LONG else value
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [_plain(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(item)] for key, item in value.items()]}
    raise TypeError(f"a value of type {type(value).__name__} cannot leave the sandbox")


def _value(data):
    if isinstance(data, list):
        return [_value(item) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError("not a tagged value")
    (kind, content), = data.items()
    if kind == "dict":
        return {_value(key): _value(item) for key, item in content}
    if kind in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](_value(item) for item in content)
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    raise ValueError(f"no such tag: {kind}")
