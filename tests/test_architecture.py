"""The directions of imports, read from the source: who may know whom (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for folder in ("c3po", "kernels/rl_kernels", "megatron_rl")
           for path in sorted((ROOT / folder).rglob("*.py")) if "hf_files" not in path.parts]

# Inside megatron_rl: a package may import those of its own row and of the rows above it that are listed.
FLOORS = {
    "types": set(),
    "signals": set(),
    "config": set(),
    "observe": {"types", "config"},
    "compat": set(),
    "topology": {"config", "compat"},
    "data": {"types", "config", "observe"},
    "rollout": {"types", "config", "observe"},
    "reward": {"types", "signals", "config", "observe"},
    "batch": {"types", "config", "observe"},
    "handoff": {"types", "config", "observe", "batch"},
    "model": {"types", "config", "observe", "compat", "topology"},
    "train_step": {"types", "config", "observe", "compat", "topology", "model"},
    "sync": {"types", "signals", "config", "observe", "compat", "topology", "model", "rollout"},
    "plan": {"types", "config", "batch", "model"},
    "loop": {"types", "config", "observe", "batch"},
    "doctor": {"observe", "reward"},
}
MAY_IMPORT_MEGATRON = {"topology", "model", "train_step", "sync", "compat"}
MAY_IMPORT_SGLANG = {"rollout", "sync", "compat"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            pytest.fail(f"{path}: relative import; write the whole name")
    return found


def room(name: str) -> str:
    """The package of megatron_rl that a module belongs to."""
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path))
def test_imports_go_downwards(path):
    name = module_name(path)
    imports = imported_modules(path)
    top = {module.split(".")[0] for module in imports}
    if name.startswith(("c3po", "rl_kernels")):
        allowed = {"torch", name.split(".")[0]} | ({"triton"} if name.endswith("triton_impl") else set())
        allowed |= {"liger_kernel"} if name == "rl_kernels.linear_logprob.liger" else set()
        assert top - allowed <= _standard_library(), f"{name} imports {sorted(top - allowed - _standard_library())}"
        return
    here = room(name)
    if here in FLOORS:
        known = {room(module) for module in imports if module.startswith("megatron_rl.")} - {here, ""}
        assert known <= FLOORS[here], f"{name} imports megatron_rl.{sorted(known - FLOORS[here])}"
    if here not in MAY_IMPORT_MEGATRON:
        assert "megatron" not in top, f"{name} imports megatron"
    if here not in MAY_IMPORT_SGLANG:
        assert "sglang" not in top, f"{name} imports sglang"
    assert "triton" not in top, f"{name} imports triton"


def test_only_configuration_and_entry_points_know_omegaconf():
    known = {module_name(path) for path in SOURCES
             if {"omegaconf", "hydra"} & {module.split(".")[0] for module in imported_modules(path)}}
    assert known == {"megatron_rl.config.load", "megatron_rl.ablations.multirun"}


def test_only_topology_reads_parallel_state_for_ranks():
    readers = {module_name(path) for path in SOURCES if "parallel_state" in path.read_text()}
    # build.py asks Megatron which virtual stage is first or last, which a Topology cannot know
    assert readers <= {"megatron_rl.topology", "megatron_rl.model.build"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path))
def test_files_stay_readable(path):
    text = path.read_text()
    text.encode("ascii")
    lines = text.splitlines()
    assert len(lines) <= 400, f"{len(lines)} lines"
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not lines, "no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno <= 80, f"{node.name} is {node.end_lineno - node.lineno} lines long"


def test_the_loop_fits_on_a_screen_or_two():
    assert len((ROOT / "megatron_rl" / "loop.py").read_text().splitlines()) <= 150
    assert len((ROOT / "megatron_rl" / "train.py").read_text().splitlines()) <= 100


def _standard_library() -> frozenset[str]:
    import sys

    return sys.stdlib_module_names
