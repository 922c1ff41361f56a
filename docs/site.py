"""What mkdocs needs to know of our pages (mkdocs.yml): they link to files of the whole tree, so that they work where
they lie, and the site takes in every file that a page links to, under source/."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\[[^\]]*\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def on_files(files, *, config):
    """Adds the files outside docs/ that pages lead to, and those that these lead to."""
    waiting, seen = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()], set()
    while waiting:
        page = waiting.pop()
        for target in _linked(page):
            if target in seen or not target.exists() or target.is_relative_to(ROOT / "docs"):
                continue
            seen.add(target)
            files.append(File.generated(config, _place(target), content=target.read_bytes()))
            if target.suffix == ".md":
                waiting.append(target)
    return files


def on_page_markdown(markdown, *, page, config, files):
    """Links as the site has them."""
    here, kept = _source(page.file.src_uri), []

    def hide(found):
        kept.append(found[0])
        return f"\0{len(kept) - 1}\0"

    def moved(found):
        target = _target(here, found[2])
        if target is None or not target.exists():
            return found[0]
        link = os.path.relpath(_place(target), Path(page.file.src_uri).parent)
        return f"{found[1]}{link}{found[3]}"

    moved_links = LINK.sub(moved, CODE.sub(hide, markdown))
    return re.sub("\0(\\d+)\0", lambda found: kept[int(found[1])], moved_links)


def _linked(page: Path) -> list[Path]:
    if page.suffix != ".md" or not page.exists():
        return []
    found = (_target(page, link) for _, link, _ in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))))
    return [target for target in found if target is not None]


def _target(page: Path, link: str) -> Path | None:
    """The file of the tree that a link on `page` leads to; a folder's README."""
    if "://" in link or link.startswith("mailto:"):
        return None
    target = (page.parent / link).resolve()
    return target / "README.md" if target.is_dir() else target


def _place(target: Path) -> str:
    """Where the site has a file of the tree."""
    path = target.relative_to(ROOT)
    return str(path.relative_to("docs")) if path.parts[0] == "docs" else f"source/{path}"


def _source(place: str) -> Path:
    """The reverse of _place."""
    return ROOT / place.removeprefix("source/") if place.startswith("source/") else ROOT / "docs" / place
