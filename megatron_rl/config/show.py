"""Configurations for reading: as YAML, and as the keys in which two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.config.load import from_json, load, to_dict
from megatron_rl.config.schema import Config


def as_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def named(what: str) -> Config:
    """The configuration that `what` names: a run's folder, a config.json, overrides `a.b=c d=e`, or `defaults`."""
    path = Path(what)
    if what == "defaults":
        return Config()
    if (path / "config.json").is_file():
        return from_json(path / "config.json")
    if path.is_file():
        return from_json(path)
    if "=" in what:
        return load(what.split())
    raise ValueError(f"{what}: neither a run's folder with config.json, nor such a file, nor overrides like "
                     "'experiment=quickstart algo.phi=2048', nor 'defaults'")


def differences(left: Config, right: Config) -> list[tuple[str, Any, Any]]:
    """(dotted key, value in left, value in right) wherever they differ, in the schema's order."""
    flat_left, flat_right = flat(to_dict(left)), flat(to_dict(right))
    keys = [*flat_left, *(key for key in flat_right if key not in flat_left)]
    return [(key, flat_left.get(key), flat_right.get(key)) for key in keys
            if flat_left.get(key) != flat_right.get(key)]


def flat(values: dict[str, Any], path: Sequence[str] = ()) -> dict[str, Any]:
    """Nested mappings -> {dotted key: value}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        here = (*path, key)
        found |= flat(value, here) if isinstance(value, dict) and value else {".".join(here): value}
    return found
