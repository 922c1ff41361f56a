"""Where the files are that come with the program: `conf/` and `examples/`.

A source tree has them at its top. An installed package has them inside itself: setup.py puts them there.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def source_tree(package: Path = PACKAGE) -> Path | None:
    """The source tree that holds the package, or None for an installed package."""
    root = package.parent
    return root if (root / "setup.py").is_file() and (root / "conf" / "config.yaml").is_file() else None


SOURCE_TREE = source_tree()
CONF_DIR = (SOURCE_TREE or PACKAGE) / "conf"
EXAMPLES = (SOURCE_TREE or PACKAGE) / "examples"


def example_file(name: str) -> str:
    """`${examples:NAME}` in a YAML file: examples/NAME of the working directory, or else the one that we bring."""
    here = Path("examples", name)
    return str(here if here.is_file() else EXAMPLES / name)
