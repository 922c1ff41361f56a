"""docs/configuration.md from the schema: `python -m megatron_rl.config.reference > docs/configuration.md`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Iterator

from megatron_rl.config.load import shown
from megatron_rl.config.schema import Config

HEADER = """\
# Configuration

This page lists every key with its type and default. `python -m megatron_rl.config.reference` writes it from the
schema in `megatron_rl/config/`, which is where defaults live. YAML files under `conf/` hold differences only.

On any command line, set keys by their path (`algo.phi=4096`) and choose groups by name (`experiment=quickstart`,
`parallel=ep2`, `algo=grpo`). `resume`, `seed` and `steps` may be given without their section `run`.
"""


def markdown() -> str:
    return HEADER + "".join(_section(Config, "", set()))


def _section(cls, path: str, seen: set[type]) -> Iterator[str]:
    """The keys of one class and of those inside it; a class that several keys hold is described at the first."""
    if cls in seen:
        return
    seen.add(cls)
    hints = typing.get_type_hints(cls)
    if path:
        text = inspect.getdoc(cls) or ""
        yield f"\n## {path}\n\n{text}\n\n| key | type | default |\n| --- | --- | --- |\n"
    nested = []
    for field in dataclasses.fields(cls):
        key, hint = f"{path}.{field.name}" if path else field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            nested.append((hint, key))
            continue
        if path:
            yield f"| `{key}` | {_type(hint)} | {_default(field)} |\n"
        element = {tuple: 0, dict: 1}.get(typing.get_origin(hint))
        if element is not None and dataclasses.is_dataclass(inside := typing.get_args(hint)[element]):
            nested.append((inside, f"{key}[i]" if element == 0 else f"{key}.<name>"))
    for hint, key in nested:
        yield from _section(hint, key, seen)


def _type(hint) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " / ".join(f"`{shown(argument)}`" for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if argument is type(None) else _type(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping to {'any value' if arguments[1] is object else _type(arguments[1])}"
    return f"section as `{hint.__name__}`" if dataclasses.is_dataclass(hint) else hint.__name__


def _default(field) -> str:
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    print(markdown(), end="")
