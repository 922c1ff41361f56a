"""c3po needs torch and nothing else: its tests pass where only torch, pytest and what these two require exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def with_requirements(*names: str) -> set[str]:
    """Installed distributions that `names` require, themselves included; extras are left out."""
    found, waiting = set(), [name.lower() for name in names]
    while waiting:
        name = waiting.pop()
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:  # required on another platform
            continue
        found.add(name)
        needed = {re.match(r"[\w.-]+", line).group().lower() for line in requirements if "extra ==" not in line}
        waiting += sorted(needed - found)
    return found


def link_distributions(names: set[str], folder: Path) -> None:
    """What these distributions put at the top of site-packages, as links in `folder`, and no other file."""
    for name in names:
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution(name).locate_file(top))


@pytest.mark.slow
def test_c3po_passes_its_tests_with_torch_and_pytest_alone(tmp_path):
    packages = tmp_path / "site-packages"
    packages.mkdir()
    link_distributions(with_requirements("torch", "pytest"), packages)
    for source in ("c3po", "tests/__init__.py", "tests/c3po", "tests/golden"):
        if (ROOT / source).exists():
            (tmp_path / source).parent.mkdir(exist_ok=True)
            (tmp_path / source).symlink_to(ROOT / source)
    hidden = "numpy", "megatron", "hypothesis", "omegaconf", "transformers"
    probe = f"import importlib.util as u, torch; print([n for n in {hidden!r} if u.find_spec(n)])"
    environment = {**os.environ, "PYTHONPATH": f"{packages}{os.pathsep}{tmp_path}", "PYTHONDONTWRITEBYTECODE": "1"}

    def alone(*arguments: str) -> str:
        result = subprocess.run([sys.executable, "-S", *arguments], cwd=tmp_path, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
        assert result.returncode == 0, result.stdout[-4000:]
        return result.stdout

    assert alone("-W", "ignore", "-c", probe).strip() == "[]"
    report = alone("-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "tests/c3po")
    passed = int(re.search(r"(\d+) passed", report).group(1))
    assert passed > 300 and not re.search(r"failed|error|skipped", report), report[-1000:]
