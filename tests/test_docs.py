"""Pages say what is there: their links lead somewhere, their commands are ones that the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_rl.cli import parse
from megatron_rl.config.load import load

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"),
                *(ROOT / "kernels").rglob("*.md"), *(ROOT / "c3po").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]{2,}\b|\.\.\.|<")


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every `megatron-rl` line in a code block."""
    found = []
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ")
                if line.startswith("megatron-rl "):
                    found.append((str(page.relative_to(ROOT)), line))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, f"{page}: no such file: {missing}"


def test_there_are_commands_to_check():
    assert len(commands()) > 10


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value)
def test_commands_are_taken(page, line):
    words = shlex.split(line, comments=True)[1:]
    options = parse(words)
    overrides = getattr(options, "overrides", [])
    if overrides and not PLACEHOLDER.search(" ".join(overrides)):
        load(overrides)
