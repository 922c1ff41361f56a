"""The fenced blocks of a text, against markdown-it-py, and in time that grows with the text."""

import gc
import random
import time

import pytest
from markdown_it import MarkdownIt

from megatron_rl.reward.markdown import fenced_blocks

PIECES = [
    "```",
    "````",
    "~~~",
    "~~~~",
    "```python",
    "``` py x",
    "a",
    "b c",
    "  ",
    "    ",
    "- a",
    "> ",
    ">",
    "1. b",
    "2. ```py",
    "* ~~~",
    "# h",
    "",
    "---",
    "`",
    "   ",
    " ",
    "x = 1",
    "- ",
    "```",
]
LENGTH = 128_000
LONG = {
    "a fence that never ends": "```" + "a" * LENGTH,
    "fences": "```\n" * (LENGTH // 4),
    "openings": "``` x\n" * (LENGTH // 6),
    "backticks": "`" * LENGTH,
    "quotes in a line": ">" * LENGTH + "```",
    "items in a line": "- " * (LENGTH // 2) + "```",
    "items in a line, then blanks": "- " * (LENGTH // 4) + "```\n" + "\n" * (LENGTH // 2) + "```",
    "quotes in each line": (">" * 60 + "\n") * (LENGTH // 61) + "```",
    "lazy lines": ">" * 20 + " a\n" + "b\n" * (LENGTH // 2) + "```",
    "items": "- a\n" * (LENGTH // 4) + "```",
    "items in items": "".join("  " * i + "- a\n" for i in range(350)) + "```",
    "fences in items": "- ```\n" * (LENGTH // 6),
    "fences in quotes": "> ```\n" * (LENGTH // 6),
    "spaces": " " * LENGTH + "```",
    "blank lines": "\n" * LENGTH + "```",
    "tabs": "\t" * LENGTH + "```",
    "lines": "a\n" * (LENGTH // 2) + "```",
    "shrinking fences": "".join("`" * n + "\n" for n in range(500, 3, -1)),
    "one block": "```\n" + "a\n" * (LENGTH // 2) + "```",
    "rules": "* " * (LENGTH // 2) + "\n```",
    "underlines": "_ " * (LENGTH // 2) + "x\n```",
    "numbers": "1. " * (LENGTH // 3) + "```",
}


def reference(text: str) -> list[tuple[str, str]]:
    """markdown-it's fences that are closed: two lines more than they hold."""
    parser = MarkdownIt("commonmark").disable(["inline", "reference", "html_block", "lheading"], True)
    return [
        (token.info.strip(), token.content)
        for token in parser.parse(text + "\n")
        if token.type == "fence" and token.map[1] - token.map[0] == token.content.count("\n") + 2
    ]


def test_blocks_are_those_of_a_commonmark_parser():
    draw = random.Random(7)
    texts = [
        "\n".join("".join(draw.choices(PIECES, k=draw.randint(1, 3))) for _ in range(draw.randint(1, 9)))
        for _ in range(4000)
    ]
    expected = [reference(text) for text in texts]
    assert sum(map(bool, expected)) > 300
    differ = [text for text, blocks in zip(texts, expected, strict=True) if fenced_blocks(text) != blocks]
    assert not differ


@pytest.fixture
def no_collection():
    """A garbage collection may cost more than what is measured: the tests before left many objects."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_the_time_grows_with_the_text(text, no_collection):
    """Sixteen times the text costs sixteen times as much, or 256 times if it were quadratic. Between lies 64."""
    took = {}
    for part in (16, 1):
        start = time.thread_time()
        fenced_blocks(text[: len(text) // part - 3] + "```" if part > 1 else text)
        took[part] = time.thread_time() - start
    assert took[1] < 0.05 or took[1] < 64 * took[16], took
    assert took[1] < 3


def test_a_fence_before_128000_characters_takes_milliseconds():
    times = []
    for _ in range(5):
        start = time.process_time()
        assert fenced_blocks("```" + "x" * LENGTH) == []
        times.append(time.process_time() - start)
    assert min(times) < 0.01
