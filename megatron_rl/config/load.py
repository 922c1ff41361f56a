"""Hydra composes YAML and overrides; `build` turns the result into the frozen schema, strictly.

Nothing below this file sees omegaconf. Unknown key -> ValueError with the nearest known one; wrong type ->
ValueError with the dotted path. YAML under conf/ holds differences from the schema's defaults only.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.resources import CONF_DIR, example_file
from megatron_rl.config.schema import Config

SHORTHANDS = {"resume": "run.resume", "seed": "run.seed", "steps": "run.steps"}
"""Overrides that may be given without their section."""
RENAMED = {"c3po": "algo"}
"""Keys of older versions, and what they are called now."""
UNREADABLE = ("text with commas, colons, equals signs, brackets or quotes needs quotes of its own inside the shell's, "
              """such as 'data.prompt_suffix="Answer: x, y"' or 'rollout.stop=["a","b"]'""")


def load(overrides: Sequence[str]) -> Config:
    """Compose conf/config.yaml with Hydra overrides (`algo.phi=4096 parallel=ep2`) and build the Config."""
    return build(compose(overrides))


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The composed configuration as plain Python values. ValueError on an override that Hydra cannot read."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not CONF_DIR.is_dir():
        raise ValueError(f"no configuration folder at {CONF_DIR}: the installation is not whole; install it again")
    OmegaConf.register_new_resolver("examples", example_file, replace=True)

    def readable(text: str) -> bool:
        try:
            return not OverridesParser.create().parse_override(text).is_sweep_override()
        except HydraException:
            return False

    translated = []
    for given in overrides:
        text = _with_quoted_path(_as_hydra(given))
        if not readable(text):
            raise ValueError(f"cannot read {given!r}: {UNREADABLE}")
        translated.append(text)
    try:
        with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
            composed = hydra_compose("config", overrides=translated)
        return typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"cannot read the configuration: {error}") from error


def _with_quoted_path(override: str) -> str:
    """`override` with quotes around its value, if it names a file or a folder: one may have any name."""
    key, _, value = override.partition("=")
    quote = next((quote for quote in ("'", '"') if quote not in value), None)
    if not key.endswith(("path", "dir", "folder")) or value in ("", "null") or "${" in value or quote is None \
            or value[:1] in ("'", '"'):
        return override
    return f"{key}={quote}{value}{quote}"


def _groups() -> set[str]:
    return {path.name for path in CONF_DIR.iterdir() if path.is_dir()}


def _as_hydra(override: str) -> str:
    """`a.b=c` may set a key that no YAML file mentions, so it becomes `++a.b=c`; group choices stay as they are."""
    key, separator, value = override.partition("=")
    if not separator:
        folder = Path(override) if Path(override).exists() else None
        hint = f"; for a checkpoint's folder write model.path={folder}" if folder and folder.is_dir() else ""
        raise ValueError(f"override {override!r} must look like section.key=value{hint}")
    key = SHORTHANDS.get(key, key)
    if key.startswith(("+", "~")) or (key.split("@")[0] in _groups() and "." not in key and _is_choice(key, value)):
        _check_choice(key, value)
        return f"{key}={value}"
    return f"++{key}={value}"


def _is_choice(group: str, value: str) -> bool:
    return not value.startswith(("{", "["))


def _check_choice(key: str, value: str) -> None:
    group = key.lstrip("+").split("@")[0]
    if group in _groups():
        known = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
        if value not in known:
            raise ValueError(f"{group}={value}: no such choice{_suggestion(value, known)}; "
                             f"there are {', '.join(known)}")


def build(raw: dict[str, Any], cls: type = Config) -> Any:
    """The Config, or another dataclass, of plain values. ValueError names the dotted key that is unknown or wrong."""
    _check_keys(raw, "")
    return _dataclass(cls, raw, "")


def _check_keys(raw: Any, path: str) -> None:
    """ValueError for a key that is no string, at any depth: as JSON, which ranks read, it would be another key."""
    if isinstance(raw, dict):
        for key, value in raw.items():
            if not isinstance(key, str):
                raise ValueError(f"{path or 'the configuration'} has a key that YAML reads as {key!r}, not as text: "
                                 "put it in quotes (on, yes, true, off, no, false, null and numbers need them)")
            _check_keys(value, _join(path, key))
    elif isinstance(raw, (list, tuple)):
        for place, value in enumerate(raw):
            _check_keys(value, f"{path}[{place}]")


def from_json(path: str | Path) -> Config:
    return build(read_json(Path(path)))


def read_json(path: Path) -> Any:
    """ValueError naming the file when it does not hold JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON values; build(to_dict(config)) == config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _dataclass(cls, raw: Any, path: str):
    if not isinstance(raw, dict):
        raise ValueError(f"{path or 'the configuration'} must be a section, not {raw!r}; set its keys, such as "
                         f"{_join(path, dataclasses.fields(cls)[0].name)}=...")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in raw:
        if (old := _join(path, key)) in RENAMED:
            raise ValueError(f"{old} is called {RENAMED[old]} now: write {RENAMED[old]} for {old} in every key, file "
                             "and command")
        if key not in names:
            raise ValueError(f"unknown key {_join(path, key)}{_nearest(key, names, path)}")
    try:
        return cls(**{key: _value(hints[key], value, _join(path, key)) for key, value in raw.items()})
    except ValueError as error:
        if path and str(error).startswith(tuple(f"{name}=" for name in names)):  # a key without its section
            raise ValueError(f"{path}.{error}") from error
        if path and path.split(".")[0] not in str(error):
            raise ValueError(f"{path}{'.' if str(error).startswith(tuple(names)) else ': '}{error}") from error
        raise


def _value(hint, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(option for option in arguments if option is not type(None)), value, path)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, path)
    if origin is typing.Literal:
        if not any(type(value) is type(option) and value == option for option in arguments):  # 1 is not true
            raise ValueError(f"{path}={value} must be one of {', '.join(map(shown, arguments))}"
                             f"{_suggestion(str(value), [str(a) for a in arguments])}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{path}={value!r} must be a list")
        return tuple(_value(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{path}={value!r} must be a mapping")
        return {key: _value(arguments[1], item, _join(path, key)) for key, item in value.items()}
    return _scalar(hint, value, path)


def shown(option: Any) -> str:
    """A choice as it is written on a command line."""
    return str(option).lower() if isinstance(option, bool) else str(option)


def _scalar(hint, value: Any, path: str) -> Any:
    if hint is object:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < sys.float_info.max:
        value = float(value)
    if type(value) is not hint:
        raise ValueError(f"{path}={value!r} must be {hint.__name__}, not {type(value).__name__}")
    if hint is float and not math.isfinite(value):  # no key means "without end" by it
        raise ValueError(f"{path}={value} must be a finite number")
    return value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _nearest(key: str, names: Sequence[str], path: str) -> str:
    """What an unknown key may have been meant for: one of that name elsewhere, one spelled like it, or any of these."""
    if elsewhere := [known for known, _ in known_keys() if known.rpartition(".")[2] == key]:
        return f" (did you mean {' or '.join(elsewhere)}?)"
    if near := _suggestion(key, names, path):
        return near
    return f"; {f'section {path} has' if path else 'there are'} {', '.join(names)}"


def known_keys(section: type = Config, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every key but those under a name that the user gives."""
    for name, hint in typing.get_type_hints(section).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from known_keys(hint, _join(path, name))
        else:
            yield _join(path, name), hint


def _suggestion(name: str, known: Sequence[str], path: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {_join(path, near[0])}?)" if near else ""
