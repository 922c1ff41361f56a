"""Files that only others' programs read: container recipes, citation, templates, workflow, hook. Linted as far as can
be without those programs: what they name exists, and what they copy is enough for the set-up."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import c3po

ROOT = Path(__file__).resolve().parents[1]
CONTAINERS = ("docker/Dockerfile", "docker/megatron_rl.def")
FORMS = [path for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
TREE = "/opt/megatron_rl"


def lines(file: str) -> list[str]:
    """Without comments, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / file).read_text(encoding="ascii"), flags=re.MULTILINE)
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def copied(file: str) -> set[str]:
    """What of the tree the recipe copies, each to the same place under TREE."""
    if file.endswith(".def"):
        pairs = [line.split() for line in section("files")]
        assert all(target == f"{TREE}/{source}" for source, target in pairs)
        return {source for source, _ in pairs}
    found = set()
    for line in lines(file):
        if line.startswith("COPY "):
            *sources, target = line.split()[1:]
            assert target == "./" or sources == [target]
            found |= set(sources)
    return found


def section(name: str) -> list[str]:
    """The lines of one section of the Apptainer definition."""
    text = lines(CONTAINERS[1])
    begin = text.index(f"%{name}") + 1
    end = next((place for place in range(begin, len(text)) if text[place].startswith("%")), len(text))
    return text[begin:end]


def shell(file: str) -> list[str]:
    """The commands that the recipe runs while it is built."""
    return section("post") if file.endswith(".def") else [
        line.removeprefix("RUN ") for line in lines(file) if line.startswith("RUN ")]


@pytest.mark.parametrize("file", CONTAINERS)
def test_what_a_container_copies_is_there_and_enough_for_the_set_up(file, tmp_path):
    assert len(copied(file)) > 8
    for name in copied(file):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    version = subprocess.run([sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True,
                             timeout=120, env={**os.environ, "PYTHONPATH": ""})
    assert version.stdout.strip().splitlines()[-1:] == [c3po.__version__], version.stderr
    packages = {Path(path).parts[0] for path in ("c3po", "kernels/rl_kernels", "megatron_rl", "conf", "examples")}
    assert packages <= copied(file) and (tmp_path / ".ci" / "constraints-gpu.txt").is_file()


@pytest.mark.parametrize("file", CONTAINERS)
def test_a_container_installs_by_the_gpu_lock_with_valid_shell(file):
    commands = shell(file)
    assert any(line.endswith("VARIANT=gpu bash .ci/setup.sh") for line in commands)
    checked = subprocess.run(["bash", "-n"], input="\n".join(commands), text=True, capture_output=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
    text = (ROOT / file).read_text(encoding="ascii")
    named = set(re.findall(r"\.ci/[\w.-]+\w", text))
    assert ".ci/constraints-gpu.txt" in named and all((ROOT / name).is_file() for name in named), named
    assert text.startswith("# NOBODY HAS BUILT THIS IMAGE YET")
    assert f"PATH={TREE}/.venv/bin:$PATH" in text


def test_both_containers_are_the_same_thing():
    docker, apptainer = CONTAINERS
    assert copied(docker) == copied(apptainer)
    install = [next(re.search(r"apt-get install [^&]*", line)[0].split() for line in shell(file)
                    if "apt-get install" in line) for file in CONTAINERS]
    assert install[0] == install[1]
    bases = [re.search(r"^(?:FROM|From:) (\S+)$", "\n".join(lines(file)), flags=re.MULTILINE)[1] for file in CONTAINERS]
    assert bases[0] == bases[1]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_is_one_that_can_be_filled_in(path):
    form = yaml.safe_load(path.read_text(encoding="ascii"))
    assert form["name"] and form["description"] and form["body"]
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids))
    for part in form["body"]:
        assert part["type"] in {"textarea", "input", "dropdown", "checkboxes"} and part["attributes"]["label"], part
    assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_there_are_forms_for_a_fault_and_for_a_wish():
    assert {path.stem for path in FORMS} >= {"bug", "feature"}


def test_the_workflow_runs_what_continuous_integration_is():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="ascii"))
    events = workflow[True]  # YAML 1.1 reads the key `on` as true
    assert events.keys() >= {"push", "pull_request"}
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert runs == [".ci/run"] and os.access(ROOT / ".ci/run", os.X_OK)


def test_the_hook_needs_no_foreign_repository_and_lints_what_make_lint_does():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="ascii"))["repos"]
    assert repository["repo"] == "local"
    (hook,) = repository["hooks"]
    assert hook["language"] == "system"
    command = shlex.split(hook["entry"])
    checked = subprocess.run([*command, "setup.py"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert command[:2] == [".venv/bin/ruff", "check"] and "$(VENV)/ruff check ." in (ROOT / "Makefile").read_text()


def test_the_citation_has_what_the_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= {"cff-version", "title", "message", "authors"}
    assert f'license="{citation["license"]}"' in (ROOT / "setup.py").read_text()
    assert "version" not in citation, "its home is c3po/version.py"
    assert all(author.get("name") or author.get("family-names") for author in citation["authors"])


def test_no_file_names_a_host_that_the_project_does_not_have():
    files = [ROOT / "setup.py", ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml", ROOT / "MANIFEST.in",
             *(path for folder in (".github", "docker") for path in (ROOT / folder).rglob("*") if path.is_file())]
    assert len(files) > 8
    assert not [str(path) for path in files if "://" in path.read_text(encoding="utf-8")]
