"""The fenced code blocks of a Markdown text, as CommonMark 0.31 defines them (sections 4.5, 5.1, 5.2), in linear time.

A parser for all of Markdown takes seconds for some texts of 128,000 characters (markdown-it-py 4.3: 23 s for lines that
continue a nested quote). Blocks of HTML are read as text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["fenced_blocks"]

_FENCE = re.compile(r"(`{3,})([^`]*)$|(~{3,})(.*)$")
_MARKER = re.compile(r"([-+*]|(\d{1,9})[.)])(?=[ \t]|$)")
_HEADING = re.compile(r"#{1,6}(?:[ \t]|$)")
QUOTE = -1


@dataclass
class _Open:
    """A fence that is open: its character and length, the columns before it, the containers around it."""

    sign: str
    length: int
    info: str
    indent: int
    depth: int
    lines: list[str]


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(info string, content) of each closed block, in order.

    A block that the text's or its container's end closes is left out.
    """
    blocks: list[tuple[str, str]] = []
    containers: list[int] = []  # QUOTE, or the columns of a list item
    quotes: list[int] = []  # their places among the containers
    fence: _Open | None = None
    in_paragraph = False
    last = max(text.rfind("```"), text.rfind("~~~"))
    if last < 0:
        return blocks
    lines = text[:last].replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n", lines)[:lines]:
        if fence is None and not containers and line[:1].isalpha():
            in_paragraph = True  # most lines, in no time
            continue
        rest, matched = _Line(line), 0
        if rest.blank:
            matched = quotes[0] if quotes else len(containers)
        else:
            while matched < len(containers) and rest.enter(containers[matched]):
                matched += 1
        if fence is not None and matched >= fence.depth:
            if rest.closes(fence):
                blocks.append((fence.info, "".join(f"{each}\n" for each in fence.lines)))
                fence = None
            else:
                fence.lines.append(rest.without_indent(fence.indent))
            continue
        fence = None
        if matched < len(containers):
            lazy = in_paragraph and not rest.blank and not rest.starts_block()
            if not lazy:
                del containers[matched:]
                quotes = [place for place in quotes if place < matched]
                in_paragraph = False
        if rest.blank:
            in_paragraph = False
            continue
        while (kind := rest.open(in_paragraph)) is not None:
            quotes += [len(containers)] if kind == QUOTE else []
            containers.append(kind)
            in_paragraph = False
        opening = _FENCE.match(rest.text, rest.at) if rest.indent < 4 else None
        if opening is not None:
            sign, info = opening[1] or opening[3], opening[2] or opening[4] or ""
            fence = _Open(sign[0], len(sign), info.strip(), rest.indent, len(containers), [])
            in_paragraph = False
        elif not (rest.indent >= 4 and not in_paragraph):
            in_paragraph = not rest.blank and not rest.is_heading_or_rule()
    return blocks


class _Line:
    """What is left of a line once the marks of containers are taken off. Columns: a tab goes on to the next fourth."""

    def __init__(self, line: str):
        self.text, self.at, self.column, self.indent = line, 0, 0, 0
        self._tail: int | None = None
        self._measure()

    def _measure(self) -> None:
        """at: the first character that is no white space; indent: the columns before it that nothing has taken."""
        start = self.column - self.indent
        while self.at < len(self.text) and self.text[self.at] in " \t":
            self.column += 1 if self.text[self.at] == " " else 4 - self.column % 4
            self.at += 1
        self.indent = self.column - start

    @property
    def blank(self) -> bool:
        return self.at == len(self.text)

    def enter(self, kind: int) -> bool:
        """Goes into an open container, if the line belongs to it."""
        if kind == QUOTE:
            return self._quote()
        if self.indent >= kind or self.blank:
            self.indent = max(0, self.indent - kind)
            return True
        return False

    def open(self, in_paragraph: bool) -> int | None:
        """Goes into a new container, if the line begins one."""
        if self._quote():
            return QUOTE
        marker = _MARKER.match(self.text, self.at) if self.indent < 4 and not self.blank else None
        if marker is None or self._is_rule():
            return None
        empty = not self.text[marker.end():].strip(" \t") if in_paragraph else False
        if in_paragraph and (empty or marker[2] not in (None, "1")):
            return None
        before = self.indent
        self._pass(len(marker[0]))
        if self.blank or self.indent > 4:
            taken = 1
        else:
            taken = self.indent
        self.indent = 0 if self.blank else self.indent - taken
        return before + len(marker[0]) + taken

    def starts_block(self) -> bool:
        """Whether the line ends a paragraph that it could also go on with."""
        if self.indent >= 4:
            return False
        text, at = self.text, self.at
        marker = _MARKER.match(text, at)
        return (text.startswith(">", at) or _FENCE.match(text, at) is not None or self.is_heading_or_rule()
                or (marker is not None and marker[2] in (None, "1") and bool(text[marker.end():].strip(" \t"))))

    def is_heading_or_rule(self) -> bool:
        return _HEADING.match(self.text, self.at) is not None or self._is_rule()

    def _is_rule(self) -> bool:
        """Whether nothing but three or more of one of *-_ is left; asked at each of a line's marks."""
        sign = self.text[self.at:self.at + 1]
        if not sign or sign not in "*-_":
            return False
        if self._tail is None:
            last = self.text.rstrip(" \t")[-1:]
            self._tail = len(self.text.rstrip(last + " \t")) if last in "*-_" else len(self.text)
        place = self.at - 1
        for _ in range(3):
            place = self.text.find(sign, place + 1)
            if self.at < self._tail or place < 0:
                return False
        return True

    def closes(self, fence: _Open) -> bool:
        rest = self.text[self.at:].rstrip(" \t") if self.indent < 4 else ""
        return len(rest) >= fence.length and rest == fence.sign * len(rest)

    def without_indent(self, columns: int) -> str:
        """The line with at most that many of its own leading columns taken off, and what containers took."""
        left = max(0, self.indent - columns)
        own = self.text[:self.at]
        spaces = own[len(own) - left:] if left <= len(own) and "\t" not in own[len(own) - left:] else None
        if self.indent == self.column and not columns:
            return self.text  # nothing was taken: as it stands, tabs and all
        return (" " * left if spaces is None else spaces) + self.text[self.at:]

    def _quote(self) -> bool:
        if self.indent >= 4 or not self.text.startswith(">", self.at):
            return False
        self._pass(1)
        self.indent -= self.indent > 0
        return True

    def _pass(self, characters: int) -> None:
        self.at += characters
        self.column += characters
        self.indent = 0
        self._measure()
