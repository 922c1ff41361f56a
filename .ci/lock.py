#!/usr/bin/env python3
"""Writes the locks that .ci/setup.sh installs by. Needs uv and a package registry; run it whenever setup.py changed.

constraints-cpu.txt, constraints-gpu.txt: one version of every package of a variant; constraints-te.txt: of what
Transformer Engine adds to the second. Where both
variants have a package it is the same version, but for the bindings of CUDA's driver, so that what the tests see on a
CPU is what a GPU machine gets.
gpu-wheels.txt: the file that pip takes for each package that only the GPU variant has. The test reads it, because
whether a package has a wheel is something that only the registry knows.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import tomllib
from collections.abc import Collection
from pathlib import Path

from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

HERE = Path(__file__).resolve().parent
PLATFORM = "x86_64-manylinux_2_34"  # SGLang's kernels need this glibc
DRIVER = "cuda-"  # bindings of the CUDA driver: SGLang asks for older ones than torch alone takes
PROGRAM = ("trainer", "rewards", "report", "slurm", "docs", "dev")
EXTRAS = {"cpu": ("engine-cpu", *PROGRAM), "gpu": ("engine", *PROGRAM), "te": ("engine", "te", *PROGRAM)}


def compile_lock(variant: str, output: Path, *options: str) -> None:
    extras = [f"--extra={extra}" for extra in EXTRAS[variant]]
    subprocess.run(["uv", "pip", "compile", "--quiet", "--no-annotate", "--no-header", "--python-version=3.12",
                    f"--python-platform={PLATFORM}", *extras, "setup.py", "--output-file", str(output), *options],
                   cwd=HERE.parent, check=True)


def write_lock(variant: str, *options: str, without: Collection[str] = ()) -> dict[str, str]:
    """Package -> version, and the file of those that are not in `without`."""
    path = HERE / f"constraints-{variant}.txt"
    path.unlink(missing_ok=True)  # uv would keep its versions
    compile_lock(variant, path, *options)
    found = dict(re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    head = f"# Every package of the variant, by `python .ci/lock.py` (uv pip compile for {PLATFORM}).\n"
    path.write_text(head + "".join(
        f"{name}=={version}\n" for name, version in found.items() if name not in without), encoding="utf-8")
    return found


def chosen_file(package: dict) -> str:
    """The wheel that pip prefers on PLATFORM, or the source distribution."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(34, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    rank = {tag: place for place, tag in enumerate(
        [*cpython_tags((3, 12), ["cp312"], platforms), *compatible_tags((3, 12), "cp312", platforms)])}
    names = [wheel["url"].rsplit("/", 1)[1].replace("%2B", "+") for wheel in package.get("wheels", ())]
    fitting = [(min(rank[tag] for tag in tags), name) for name in names
               if (tags := parse_wheel_filename(name)[3] & rank.keys())]
    return min(fitting)[1] if fitting else package["sdist"]["url"].rsplit("/", 1)[1]


def main() -> None:
    cpu = write_lock("cpu")
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) / "shared.txt"
        shared.write_text("".join(f"{name}=={version}\n" for name, version in cpu.items()
                                  if not name.startswith(DRIVER)), encoding="utf-8")
        gpu = write_lock("gpu", f"--constraints={shared}")
        write_lock("te", "--constraints=.ci/constraints-gpu.txt", without=gpu)
        path = Path(folder) / "pylock.toml"
        compile_lock("gpu", path, "--constraints=.ci/constraints-gpu.txt", "--format=pylock.toml")
        packages = tomllib.loads(path.read_text(encoding="utf-8"))["packages"]
    files = [chosen_file(package) for package in packages
             if canonicalize_name(package["name"]) in gpu.keys() - cpu.keys()]
    (HERE / "gpu-wheels.txt").write_text(
        "# What pip takes for each package that only the GPU variant has, by `python .ci/lock.py`.\n"
        + "".join(f"{name}\n" for name in sorted(files)), encoding="utf-8")


if __name__ == "__main__":
    main()
