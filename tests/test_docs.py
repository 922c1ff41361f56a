"""Pages say what is there: their links lead somewhere, their commands are ones that the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from megatron_rl import usage
from megatron_rl.cli import main, parse
from megatron_rl.config.load import load
from megatron_rl.pipeline.plan import plan

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"),
                *(ROOT / "kernels").rglob("*.md"), *(ROOT / "c3po").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
ASSIGNMENTS = re.compile(r"^(?:[A-Z_]+=\S+ +)+")
QUOTED = re.compile(r"\$'([^']*)'")
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]{2,}\b|\.\.\.|<")


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every `megatron-rl` line in a code block, and of every example of --help."""
    found = []
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                line = ASSIGNMENTS.sub("", line.strip().removeprefix("$ "))
                if line.startswith("megatron-rl "):
                    found.append((str(page.relative_to(ROOT)), line))
    texts = [usage.TOP_EXAMPLES, *(text.examples for part in (usage.COMMANDS, usage.DATA, usage.CONVERT, usage.CONFIG)
                                   for text in part.values())]
    lines = (line.strip() for text in texts for line in text.splitlines())
    return found + [("--help", line) for line in lines if line.startswith("megatron-rl ")]


def words(line: str) -> list[str]:
    """As a shell reads them, $'...' with its line breaks."""
    line = QUOTED.sub(lambda found: shlex.quote(found[1].replace("\\n", "\n")), line)
    return shlex.split(line, comments=True)[1:]


def anchors(page: Path) -> set[str]:
    """What headings are called in links: lower case, words joined by hyphens, punctuation left out."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(page.read_text())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page}: no such file: {target}"
        assert not anchor or anchor in anchors(file), f"{page}: {file.name} has no heading #{anchor}"


def test_the_index_leads_to_every_page_and_the_readme_to_the_index():
    index = {target for target, _ in LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - index == {"README.md"}
    readme = {target for target, _ in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert "docs/README.md" in readme


def test_the_site_has_every_page_in_its_contents():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    values = [value for part in nav for value in part.values()]
    listed = [page for value in values for page in ([value] if isinstance(value, str) else value)]
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)


NAMED_KEY = re.compile(r"`([a-z_]+(?:[./][a-z_]+)*(?:\.\*)?)`")


def test_the_glossary_names_keys_and_metrics_that_exist():
    """The last column of each row."""
    rows = [line.split(" | ")[-1] for line in (ROOT / "docs" / "glossary.md").read_text().splitlines()
            if line.startswith("| ") and "---" not in line]
    named = {name for row in rows for name in NAMED_KEY.findall(row)}
    page = (ROOT / "docs" / "metrics.md").read_text()
    metrics = set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))
    (phase_row,) = re.findall(r"^\| `time/<phase>`.*$", page, re.MULTILINE)
    phases = {f"time/{name}" for name in re.findall(r"`(\w+)`", phase_row)}
    assert len(named) > 50 and {name for name in named if "/" in name} - metrics - phases == set()
    for key in {name for name in named if "/" not in name}:
        value = load([])
        for part in key.removesuffix(".*").split("."):
            assert hasattr(value, part), f"docs/glossary.md: no such key: {key}"
            value = getattr(value, part)


def test_there_are_commands_and_links_to_check():
    assert len(commands()) > 10
    assert sum(len(LINK.findall(page.read_text(encoding="utf-8"))) for page in PAGES) > 100


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value)
def test_commands_are_taken(page, line):
    if line.startswith("megatron-rl COMMAND"):
        return
    options = parse(words(line))
    assert options.command == words(line)[0]
    overrides = getattr(options, "overrides", [])
    if overrides and not PLACEHOLDER.search(" ".join(overrides)):
        (plan if options.command == "pipeline" else load)(overrides)


def needs_nothing(line: str) -> bool:
    """Whether a command of the pages needs no checkpoint, no engine and no file that a reader has yet to make."""
    return (" --check " in f"{line} " or " --dry-run" in line
            or "=examples/" in line and line.startswith("megatron-rl data ")) and " ablate " not in line


@pytest.mark.slow
@pytest.mark.parametrize("line", sorted({line for _, line in commands() if needs_nothing(line)}))
def test_commands_that_need_nothing_run(line, tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    assert main(words(line)) == 0, capsys.readouterr().err
