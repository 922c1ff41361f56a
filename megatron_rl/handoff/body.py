"""Plain values and numpy arrays in one safetensors body. Shards and states travel, and lie on the disk, in this form.

The arrays are the tensors. Everything around them is JSON in the header, under the one key of its metadata. Equal
values give equal bytes. JSON turns tuples into lists and keys into text.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

_TREE, _ARRAY = "tree", "$array"


def dump(value: Any) -> bytes:
    """The body of `value`: dicts, lists, numbers, text, None, and arrays anywhere among them."""
    arrays: dict[str, np.ndarray] = {}

    def plain(each: Any) -> Any:
        if isinstance(each, np.ndarray):
            name = f"{len(arrays):08d}"
            arrays[name] = np.ascontiguousarray(each)
            return {_ARRAY: name}
        if isinstance(each, dict):
            return {key: plain(inner) for key, inner in each.items()}
        if isinstance(each, list | tuple):
            return [plain(inner) for inner in each]
        return each

    tree = json.dumps(plain(value))
    return save_tensors(arrays, metadata={_TREE: tree})


def load(body: bytes) -> Any:
    """The dumped value. ValueError if the body is not one of this program, for example because it was cut short."""
    try:
        length = int.from_bytes(body[:8], "little")
        tree = json.loads(json.loads(body[8:8 + length])["__metadata__"][_TREE])
        arrays = load_tensors(body)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"not a safetensors body of this program ({len(body)} bytes): {error}") from error

    def filled(each: Any) -> Any:
        if isinstance(each, dict):
            return arrays[each[_ARRAY]] if each.keys() == {_ARRAY} else {k: filled(v) for k, v in each.items()}
        return [filled(inner) for inner in each] if isinstance(each, list) else each

    return filled(tree)
