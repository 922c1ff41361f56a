"""docs/configuration.md from the schema: `python -m megatron_rl.config.reference > docs/configuration.md`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rl.config.load import shown
from megatron_rl.config.schema import Config

HEADER = """\
# Configuration

This page lists every key with its type, default and meaning, as `megatron-rl config explain KEY` prints them.
`python -m megatron_rl.config.reference` writes it from the schema in `megatron_rl/config/`, which is where defaults
live. YAML files under `conf/` hold differences only.

On any command line, set keys by their path (`algo.phi=4096`) and choose groups by name (`experiment=quickstart`,
`parallel=ep2`, `algo=grpo`). `resume`, `seed` and `steps` may be given without their section `run`.
"""


@dataclass(frozen=True)
class Key:
    """One key of the configuration. meaning: its own sentences, in Markdown."""

    name: str
    type: str
    default: str
    meaning: str


def markdown() -> str:
    return HEADER + "".join(_section(Config, "", set()))


def keys() -> dict[str, Key]:
    """Every key by its path; `<name>` and `[i]` stand for what the user chooses."""
    return {key.name: key for _, _, found in _classes(Config, "", set()) for key in found}


def explained(name: str) -> str:
    """What `megatron-rl config explain` prints. ValueError for an unknown key, with the nearest ones."""
    known = keys()
    if name in known:
        key = known[name]
        return f"{key.name}: {key.type}, default {key.default}\n\n{key.meaning}".replace("`", "")
    inside = [key for key in known if key.startswith(f"{name}.")]
    if inside:
        return f"{name} is a section with these keys:\n" + "".join(f"  {key}\n" for key in inside)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or [
        key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    raise ValueError(f"{name} is no key of the configuration" + (f"; did you mean {', '.join(near)}?" if near else ""))


def _section(cls, path: str, seen: set[type]) -> Iterator[str]:
    for cls_, where, found in _classes(cls, path, seen):
        if where:
            intro, _ = _parts(cls_)
            yield f"\n## {where}\n\n{intro}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n"
            for key in found:
                meaning = key.meaning.replace("|", "\\|")
                yield f"| <a id=\"{key.name}\"></a>`{key.name}` | {key.type} | {key.default} | {meaning} |\n"


def _classes(cls, path: str, seen: set[type]) -> Iterator[tuple[type, str, list[Key]]]:
    """Each class of the schema with its path and its keys; a class that several keys hold comes at the first."""
    if cls in seen:
        return
    seen.add(cls)
    hints, nested, found = typing.get_type_hints(cls), [], []
    _, said = _parts(cls)
    for field in dataclasses.fields(cls):
        key, hint = f"{path}.{field.name}" if path else field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            nested.append((hint, key))
            continue
        found.append(Key(key, _type(hint), _default(field), said.get(field.name, "")))
        element = {tuple: 0, dict: 1}.get(typing.get_origin(hint))
        if element is not None and dataclasses.is_dataclass(inside := typing.get_args(hint)[element]):
            nested.append((inside, f"{key}[i]" if element == 0 else f"{key}.<name>"))
    yield cls, path, found if path else []
    for hint, key in nested:
        yield from _classes(hint, key, seen)


def _parts(cls) -> tuple[str, dict[str, str]]:
    """(what a class's docstring says of the section, what it says of each key).

    A key's sentences begin with its name, or with the names of several keys, and a colon; they end where the next such
    beginning or a blank line is.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    names = "|".join(sorted(fields, key=len, reverse=True))
    begins = re.compile(rf"(?:^- |(?<=[.;] )|(?<=\) ))((?:{names})(?:(?:,| and) (?:{names}))*(?: \([^)]*\))?): ",
                        re.MULTILINE)
    intro, said = [], {}
    for block in _blocks(cls):
        text = " ".join(block.split())
        places = [*begins.finditer(text)]
        if not places or places[0].start() > 0:
            intro.append(text[:places[0].start()].strip() if places else text)
        ends = [*(place.start() for place in places[1:]), len(text)]
        for place, end in zip(places, ends if places else [], strict=True):
            sentences = text[place.end():end].strip()
            for name in re.findall(rf"\b(?:{names})\b", place[1]):
                said[name] = sentences[:1].upper() + sentences[1:]
    return "\n\n".join(intro), said


def _blocks(cls) -> list[str]:
    return re.split(r"\n\n|\n(?=- )", inspect.getdoc(cls) or "")


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
    name = hint.__name__
    return f"section as `{name}`" if dataclasses.is_dataclass(hint) else name


def _default(field) -> str:
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    print(markdown(), end="")
