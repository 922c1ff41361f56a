"""Rates in a file: assumed ones are replaced by those that somebody measured or knows.

The file is JSON: `card`, what the rates are of; `ranks` and `engine`, fields of roofline.Rates and engines.EngineRates,
each as far as it differs from the default; `measured`, the names of those that were measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rl.observe.files import write_whole
from megatron_rl.rehearsal.engines import EngineRates
from megatron_rl.rehearsal.roofline import Rates


@dataclass(frozen=True)
class RatesFile:
    """card: None without a file. measured: names such as ranks.matrix_share."""

    card: str | None = None
    ranks: Rates = field(default_factory=Rates)
    engine: EngineRates = field(default_factory=EngineRates)
    measured: tuple[str, ...] = ()

    def stated(self) -> str:
        """What a report says of the rates of the ranks."""
        if self.card is None:
            return self.ranks.stated()
        measured = f"measured: {', '.join(self.measured)}" if self.measured else "nothing of it measured"
        return f"{self.ranks.stated()} ({self.card}; {measured})"


def read_rates(file: str | None) -> RatesFile:
    """ValueError names the file and the key of what is no rate or no positive number. None: the defaults."""
    if file is None:
        return RatesFile()
    try:
        given = json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--rates {file}: not JSON: {error}") from error
    if not isinstance(given, dict) or not isinstance(given.get("card"), str):
        raise ValueError(f"--rates {file}: expected an object with `card`, the name of what the rates are of")
    for key in given.keys() - {"card", "ranks", "engine", "measured"}:
        raise ValueError(f"--rates {file}: {key} is none of card, ranks, engine, measured")
    found = RatesFile(given["card"], _taken(file, "ranks", Rates(), given.get("ranks", {})),
                      _taken(file, "engine", EngineRates(), given.get("engine", {})),
                      tuple(given.get("measured", ())))
    known = {f"{section}.{each.name}" for section, rates in (("ranks", found.ranks), ("engine", found.engine))
             for each in dataclasses.fields(rates)}
    for name in found.measured:
        if name not in known:
            raise ValueError(f"--rates {file}: measured names {name}, which is no rate")
    return found


def _taken[R: Rates | EngineRates](file: str, section: str, default: R, given: Mapping[str, Any]) -> R:
    known = {each.name for each in dataclasses.fields(default)}
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"--rates {file}: {section}.{key} is no rate; there are {', '.join(sorted(known))}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"--rates {file}: {section}.{key}={value!r} must be a positive number")
    return dataclasses.replace(default, **given)


def write_rates(file: str, rates: RatesFile) -> None:
    """Every rate, so that a later change of a default does not change what the file says."""
    write_whole(Path(file), json.dumps({
        "card": rates.card, "ranks": dataclasses.asdict(rates.ranks), "engine": dataclasses.asdict(rates.engine),
        "measured": list(rates.measured)}, indent=1) + "\n")
