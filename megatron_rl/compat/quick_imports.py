"""Imports of thousands of modules in less time: torch, Megatron and transformers, or SGLang.

Two things that Python does meanwhile take a fifth of it (Python 3.12, transformers 5.19.0):
 - the garbage collector looks, again and again, at ever more objects of which none will go;
 - transformers asks for `importlib.metadata.packages_distributions()`, which makes an object of each of the 75,000
   files that are installed. Delete when transformers asks for the distributions that it looks up.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import importlib.metadata
import inspect
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """What is imported inside stays for as long as the process lives."""
    original = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = packages_distributions
    gc.disable()
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = original
        gc.freeze()
        gc.enable()


def packages_distributions() -> dict[str, list[str]]:
    """What importlib.metadata.packages_distributions() returns, from the text of the files that it parses."""
    found = collections.defaultdict(list)
    for distribution in importlib.metadata.distributions():
        for package in _packages(distribution):
            found[package].append(distribution.metadata["Name"])
    return dict(found)


def _packages(distribution: importlib.metadata.Distribution) -> set[str]:
    declared = distribution.read_text("top_level.txt")
    if declared is not None and declared.split():
        return declared.split()
    files = (line.partition(",")[0] for line in (distribution.read_text("RECORD") or "").splitlines())
    firsts = {file.partition("/")[:2] for file in files}
    names = {first if slash else inspect.getmodulename(first) or first for first, slash in firsts
             if Path(distribution.locate_file(first)).exists()}  # a vendored wheel lists what was left out
    return {name for name in names if "." not in name}
