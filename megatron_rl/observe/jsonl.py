"""Files of one JSON object per line, written while the run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.observe.files import write_whole


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file. A last line without its newline was being written when the run stopped: it is left out.

    ValueError names the file and the line of anything else that is not a JSON object.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    return rows


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites a file with the rows that `keep` accepts, at once or not at all. A missing file stays missing."""
    if not path.exists():
        return
    kept = [row for row in read_jsonl(path) if keep(row)]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
