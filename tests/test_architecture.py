"""The directions of imports, read from the source: who may know whom (docs/architecture.md)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for folder in ("c3po", "kernels/rl_kernels", "megatron_rl")
           for path in sorted((ROOT / folder).rglob("*.py")) if "hf_files" not in path.parts]

# Inside megatron_rl: what each package may import besides itself. Two programs stand side by side, orchestrator and
# trainer, and neither imports the other; what both need stands below both.
LEAVES = {"types", "signals", "foreign", "config", "observe", "compat"}
ENGINES = {"rollout", "environment", "reward", "data", "prompts"}
LAUNCHED = {"orchestrator", "trainer", "loop", "recipes", "launch"}
FLOORS = {
    "types": set(),
    "signals": set(),
    "foreign": set(),
    "config": set(),
    "observe": {"types", "foreign", "config"},
    "compat": set(),
    "topology": {"config", "compat"},
    "data": {"types", "foreign", "config", "observe"},
    "rollout": {"types", "foreign", "config", "observe", "compat"},
    "environment": {"types", "foreign", "config", "observe", "rollout"},
    "reward": {"types", "signals", "foreign", "config", "observe", "compat"},
    "batch": {"types", "foreign", "config", "observe"},
    "handoff": {"types", "config", "observe", "batch"},
    "prompts": {"types", "config", "data", "model", "reward"},
    "model": {"types", "config", "observe", "compat", "topology"},
    "train_step": {"types", "config", "observe", "compat", "topology", "model"},
    "sync": {"types", "signals", "config", "observe", "compat", "topology", "model", "rollout"},
    "plan": {"types", "config", "batch", "model"},
    "rehearsal": {"types", "config", "observe", "batch", "handoff", "rollout", "model", "topology", "train_step",
                  "plan", "loop", "orchestrator", "trainer"},
    "loop": {"types", "config", "observe", "batch"},
    "orchestrator": {*LEAVES, *ENGINES, "batch", "handoff", "loop", "model", "sync"},
    "trainer": {*LEAVES, "rollout", "batch", "handoff", "loop", "model", "plan", "sync", "topology", "train_step"},
    "launch": {*LEAVES, "preflight_gpu", "rollout", "model", "loop", "orchestrator", "trainer"},
    "recipes": {*LEAVES, *ENGINES, "model", "topology", "train_step", "orchestrator", "trainer", "launch"},
    "doctor": {"observe", "reward", "compat", "config"},
    "preflight_gpu": {*LEAVES, "model"},
    "preflight": {*LEAVES, *ENGINES, "batch", "model", "plan", "orchestrator", "preflight_gpu"},
    "train": {"compat", "config", "rollout", "signals", "recipes", "trainer"},
    "forked_ranks": {"compat", "train"},
    "runs": {*LEAVES, "rollout", "model", "preflight", "preflight_gpu", *LAUNCHED},
    "pipeline": {*LEAVES, *ENGINES, "model", "preflight", "runs", *LAUNCHED},
    "ablations": {*LEAVES, "preflight", "prompts", "runs", *LAUNCHED},
    "completion": {"config"},
    "usage": set(),
    "commands": {*LEAVES, "model", "plan", "rehearsal", "preflight", "preflight_gpu", "runs", "pipeline", "ablations",
                 "completion", "doctor", *LAUNCHED},
    "cli": {"commands", "usage"},
}
MAY_IMPORT_MEGATRON = {"topology", "model", "train_step", "sync", "compat", "rehearsal"}
MAY_IMPORT_SGLANG = {"rollout", "environment", "sync", "compat"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


LAZY_DETOURS = {"megatron_rl.ablations.multirun": {"megatron_rl.ablations.command"}}
"""Hydra's application, which starts itself anew in a job and there plans what it was started from."""


def imported_modules(path: Path, *, at_run_time: bool = False) -> set[str]:
    """Whole names. at_run_time: without what is imported under TYPE_CHECKING."""
    found, tree = set(), ast.parse(path.read_text())
    if at_run_time:
        tree.body = [node for node in tree.body
                     if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
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
    if here:
        assert here in FLOORS, f"megatron_rl.{here} has no rule: say in FLOORS what it may import"
        known = {room(module) for module in imports if module.startswith("megatron_rl.")} - {here, "", "__version__"}
        assert known <= FLOORS[here], f"{name} imports megatron_rl.{sorted(known - FLOORS[here])}"
    if here not in MAY_IMPORT_MEGATRON:
        assert "megatron" not in top, f"{name} imports megatron"
    if here not in MAY_IMPORT_SGLANG:
        assert "sglang" not in top, f"{name} imports sglang"
    assert "triton" not in top, f"{name} imports triton"


def graph_of_files() -> dict[str, set[str]]:
    """Module of megatron_rl -> those that it imports, anywhere in it but under TYPE_CHECKING.

    Without the two that wait for somebody else to import Megatron, and then adapt it.
    """
    paths = {module_name(path): path for path in SOURCES if "megatron_rl" in path.parts}
    del paths["megatron_rl"], paths["megatron_rl.compat"]
    return {name: {module for module in imported_modules(path, at_run_time=True) if module in paths} - {name}
            for name, path in paths.items()}


def cycle_in(graph: dict[str, set[str]]) -> list[str] | None:
    """The nodes of one cycle, or None: whatever is left when nodes that nothing left imports are taken away."""
    left = dict(graph)
    while free := [node for node, targets in left.items() if not targets & left.keys()]:
        for node in free:
            del left[node]
    return sorted(left) or None


def test_no_file_and_no_package_imports_itself_by_a_detour():
    files = graph_of_files()
    assert cycle_in({name: targets - LAZY_DETOURS.get(name, set()) for name, targets in files.items()}) is None
    packages: dict[str, set[str]] = {}
    for name, targets in files.items():
        packages.setdefault(room(name), set()).update({room(target) for target in targets} - {room(name), ""})
    assert cycle_in({name: targets for name, targets in packages.items() if name}) is None
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["a", "b", "c"]


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    found, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += graph.get(name, set())
    return found


def test_the_orchestrator_holds_neither_megatron_nor_a_process_group():
    """Not even by way of what it imports; what is reached are modules that only the trainer's side may use."""
    files, paths = graph_of_files(), {module_name(path): path for path in SOURCES}
    known = set().union(*(reachable(name, files) for name in files if room(name) == "orchestrator"))
    assert "megatron_rl.orchestrator.main" in known and "megatron_rl.rollout.fleet" in known
    for name in known:
        top = {module.split(".")[0] for module in imported_modules(paths[name], at_run_time=True)}
        assert "megatron" not in top and "sglang" not in top, f"the orchestrator reaches {name}"
        assert "torch.distributed" not in imported_modules(paths[name]), f"the orchestrator reaches {name}"
        assert "init_process_group" not in paths[name].read_text(), f"the orchestrator reaches {name}"


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


BEGINS_WITH_OF = re.compile(r"(?:^|[.;:|] |\n)\s*(Of [A-Za-z`][^.\n]*)")
OTHER_CODE = sorted(path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "*/README.md", "*/*/*/README.md", "examples/*/*.md")
               for path in ROOT.glob(pattern))


def prose(path: Path) -> list[str]:
    """The docstrings of a module, those of constants too; the whole of a page."""
    if path.suffix == ".md":
        return [path.read_text(encoding="utf-8")]
    constants = (node.value for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    return [constant.value for constant in constants if isinstance(constant.value, str)]


@pytest.mark.parametrize("path", [*SOURCES, *OTHER_CODE, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_sentence_begins_with_of(path):
    """A sentence names its subject first: "The ranks of stage 0", not "Of stage 0 the ranks"."""
    found = [sentence for text in prose(path) for sentence in BEGINS_WITH_OF.findall(text)]
    assert found == []


def test_the_loop_fits_on_a_screen_or_two():
    assert len((ROOT / "megatron_rl" / "loop.py").read_text().splitlines()) <= 150
    assert len((ROOT / "megatron_rl" / "train.py").read_text().splitlines()) <= 100


def test_the_page_lists_every_package_above_what_it_may_import():
    page = (ROOT / "docs" / "architecture.md").read_text()
    listed = page.split("## Folders")[1].split("```")[1].replace("|", " ").splitlines()
    lines = {name: number for number, line in enumerate(listed) for name in line.split()}
    assert FLOORS.keys() - lines.keys() == set()
    upward = [(name, target) for name, targets in FLOORS.items() for target in targets
              if lines[target] <= lines[name]]
    assert upward == []


WALKS = {"The step's budget": 10, "A rollout's log-probability": 12, "A published tensor": 8}
"""Headings of docs/architecture.md, and how many files each walk may have."""
STEP_OF_WALK = re.compile(r"^\| (\d+) \| `([^`]+)` \| `([^`]+)` \| .* \| `([^`]+)` \|$", re.MULTILINE)


def walk(heading: str) -> list[tuple[str, str, str, str]]:
    """(number, file, function, name) of each row."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.split(f"\n### {heading}\n")[1].split("\n#")[0]
    rows = STEP_OF_WALK.findall(section)
    assert len(rows) == len(re.findall(r"^\| \d", section, re.MULTILINE)), "a row is not of the table's form"
    return rows


def source_of(path: Path, qualified: str) -> str | None:
    """The text of a function `f` or a method `Class.f`; None if the file has no such function."""
    text = path.read_text()
    body = ast.parse(text).body
    *classes, last = qualified.split(".")
    for name in classes:
        body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == name), [])
    found = next((node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                  and node.name == last), None)
    return None if found is None else ast.get_source_segment(text, found)


@pytest.mark.parametrize("heading", WALKS)
def test_the_walk_of_a_value_leads_through_functions_that_exist_and_never_back(heading):
    rows = walk(heading)
    files = [file for _, file, _, _ in rows]
    assert 5 <= len(files) <= WALKS[heading]
    assert [number for number, *_ in rows] == [str(place + 1) for place in range(len(rows))]
    assert len(set(files)) == len(files), "the walk returns to a file that it has left"
    for _, file, function, name in rows:
        assert (ROOT / file).is_file(), f"no such file: {file}"
        source = source_of(ROOT / file, function)
        assert source is not None, f"{file} has no function {function}"
        assert re.search(rf"\b{re.escape(name)}\b", source), f"{file}: {function} says nothing of {name}"


def _standard_library() -> frozenset[str]:
    import sys

    return sys.stdlib_module_names
