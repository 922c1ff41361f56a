"""The locks that the set-up installs by: they match setup.py, and no package of the GPU variant alone is compiled."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.tags import parse_tag
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("c3po", "kernels/rl_kernels", "megatron_rl")
LOGGERS = {"tensorboard", "mlflow", "swanlab"}
ELSEWHERE = {"cpu": {"engine", "te"} | LOGGERS, "gpu": {"engine-cpu", "te"} | LOGGERS}
"""The extras that a variant does not install; it installs all others."""
BROUGHT = {"jinja2": "sglang", "tokenizers": "transformers", "yaml": "hydra-core", "omegaconf": "hydra-core",
           "triton": "torch"}
"""Modules that we import and that come with a package that we declare."""
NAMED = {"simdjson": "pysimdjson", "megatron": "megatron-core", "hydra": "hydra-core", "mlflow": "mlflow-skinny"}
WHERE_FOUND = {"liger_kernel"}


def locked(variant: str) -> dict[str, str]:
    text = (ROOT / ".ci" / f"constraints-{variant}.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, flags=re.MULTILINE))


def declared() -> tuple[list[str], dict[str, list[str]]]:
    """install_requires and extras_require, as setup.py writes them down; the extra `engine-cpu` is a file."""
    (call,) = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
               if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"]
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    extras = {key.value: value for key, value in zip(keywords["extras_require"].keys,
                                                     keywords["extras_require"].values, strict=True)}
    lines = (ROOT / ".ci" / "requirements-cpu-engine.txt").read_text(encoding="utf-8").splitlines()
    of_file = [line for line in lines if line and not line.startswith("#")]
    return ast.literal_eval(keywords["install_requires"]), {
        name: of_file if name == "engine-cpu" else ast.literal_eval(value) for name, value in extras.items()}


@pytest.mark.parametrize("variant", ELSEWHERE)
def test_the_lock_is_that_of_setup_py(variant):
    required, extras = declared()
    lock = locked(variant)
    assert len(lock) > 150
    for line in [*required, *(each for name in extras.keys() - ELSEWHERE[variant] for each in extras[name])]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name in lock, f"{line}: not in constraints-{variant}.txt; run `python .ci/lock.py`"
        assert requirement.specifier.contains(lock[name], prereleases=True), \
            f"{line}: constraints-{variant}.txt has {lock[name]}; run `python .ci/lock.py`"


def test_the_set_up_installs_every_extra_of_its_variant():
    script = (ROOT / ".ci" / "setup.sh").read_text(encoding="utf-8")
    shared = re.search(r"^EXTRAS=(\S+)", script, flags=re.MULTILINE)[1]
    asked = [set(text.replace("$EXTRAS", shared).split(",")) for text in re.findall(r'-e "\.\[(.*?)\]"', script)]
    _, extras = declared()
    assert sorted(map(sorted, asked)) == sorted(map(sorted, (
        extras.keys() - ELSEWHERE["cpu"], extras.keys() - ELSEWHERE["gpu"], extras.keys() - {"engine-cpu"} - LOGGERS)))


def imports(*folders: str) -> set[str]:
    """Top-level modules that the sources import and that are neither Python's nor ours."""
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py") if "hf_files" not in path.parts):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {name.split(".")[0] for name in names}
    beside = {path.stem for path in (ROOT / "megatron_rl" / "reward" / "harness").glob("*.py")}  # in a box of its own
    return found - sys.stdlib_module_names - {"c3po", "rl_kernels", "megatron_rl"} - beside - WHERE_FOUND


def distributions(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_a_base_install_asks_for_what_c3po_and_rl_kernels_import_and_leaves_versions_to_others():
    required, _ = declared()
    assert distributions(required) == {BROUGHT.get(name, name) for name in imports(*SOURCES[:2])}
    for line in required:
        assert {spec.operator for spec in Requirement(line).specifier} == {">="}, line


def test_everything_that_is_imported_is_declared():
    required, extras = declared()
    known = distributions([*required, *(line for lines in extras.values() for line in lines)])
    used = {BROUGHT.get(name, canonicalize_name(NAMED.get(name, name))) for name in imports(*SOURCES)}
    assert len(used) > 15 and used <= known, used - known


def test_both_variants_have_the_same_versions_of_what_both_have():
    cpu, gpu = locked("cpu"), locked("gpu")
    differing = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert differing <= {"cuda-bindings"}, differing  # torch and SGLang together want another than torch alone


def test_no_package_of_the_gpu_variant_alone_is_built_from_source():
    """pip would take these files on x86-64 with Python 3.12 and glibc 2.34; `.ci/lock.py` asked the registry."""
    cpu, gpu = locked("cpu"), locked("gpu")
    lines = (ROOT / ".ci" / "gpu-wheels.txt").read_text(encoding="utf-8").splitlines()
    wheels = {}
    for line in lines:
        if not line.startswith("#"):
            name, version, _, tags = parse_wheel_filename(line)  # raises for a source distribution
            wheels[name] = (str(version), tags)
    assert wheels.keys() == gpu.keys() - cpu.keys()
    for name, (version, tags) in wheels.items():
        assert version == gpu[name], f"{name}: gpu-wheels.txt has {version}; run `python .ci/lock.py`"
        assert any(fits(tag) for tag in tags), f"{name}: no wheel for Python 3.12 and glibc 2.34"


def fits(tag) -> bool:
    if tag.platform == "any":
        glibc = 0
    elif found := re.fullmatch(r"manylinux_2_(\d+)_x86_64", tag.platform):
        glibc = int(found[1])
    else:
        glibc = 17 if tag.platform in ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64") else 99
    python = tag.interpreter in ("py3", "py312", "cp312") or (
        tag.abi == "abi3" and int(tag.interpreter.removeprefix("cp3")) <= 12)
    return python and tag.abi in ("none", "abi3", "cp312") and glibc <= 34


@pytest.mark.parametrize(("file", "expected"), [
    ("cp312-cp312-manylinux_2_34_x86_64", True), ("cp310-abi3-manylinux2014_x86_64", True), ("py3-none-any", True),
    ("cp312-cp312-manylinux_2_39_x86_64", False), ("cp312-cp312-manylinux_2_28_aarch64", False),
    ("cp313-cp313-manylinux_2_28_x86_64", False), ("cp313-abi3-manylinux_2_28_x86_64", False)])
def test_which_wheels_fit(file, expected):
    assert any(map(fits, parse_tag(file))) == expected


def test_transformer_engine_is_an_extra_of_its_own():
    """It has no wheel for torch, so whoever wants it asks for it; nothing else brings it."""
    required, extras = declared()
    named = {name for name, lines in {"": required, **extras}.items() if any("transformer" in line and "engine" in line
                                                                             for line in lines)}
    assert named == {"te"}
    assert not any(name.startswith("transformer-engine") for name in locked("gpu"))
    te, pin = locked("te"), Requirement(extras["te"][0]).specifier
    assert {name for name in te if name.startswith("transformer-engine")} == {
        "transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"}
    assert all(pin.contains(version) for name, version in te.items() if name.startswith("transformer-engine"))
    assert te.keys().isdisjoint(locked("gpu"))
