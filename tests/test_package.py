"""What `pip install .` brings: a wheel of a copy of the sources, unpacked, used from a folder with nothing else."""

from __future__ import annotations

import ast
import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import c3po
import megatron_rl
from megatron_rl.config.resources import source_tree

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"c3po": "c3po", "kernels/rl_kernels": "rl_kernels", "megatron_rl": "megatron_rl", "conf": "megatron_rl/conf"}
UNUSED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.png", "*.egg-info")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The unpacked wheel. It is built from a copy, because a build leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("package")
    copy, wheels, site = folder / "copy", folder / "wheels", folder / "site"
    copy.mkdir()
    for path in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / path, copy)
    for path in (".ci", "c3po", "kernels", "megatron_rl", "conf", "examples"):
        shutil.copytree(ROOT / path, copy / path, ignore=UNUSED)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-index",
               "--no-build-isolation", "--wheel-dir", str(wheels), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr[-4000:]
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    return site


def program(installed: Path, folder: Path, *words: str, base: bool = False) -> subprocess.CompletedProcess:
    """The program of the unpacked wheel, in `folder`. base: without the packages that only extras bring."""
    hide = ("import sys\nsys.modules.update(dict.fromkeys(['rich', 'hydra', 'psutil', 'transformers', 'numpy']))\n"
            "from megatron_rl.cli import main\nsys.exit(main())")
    start = ["-c", hide] if base else ["-m", "megatron_rl.cli"]
    environment = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "120", "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.run([sys.executable, *start, *words], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=600)


def test_every_file_that_the_program_reads_is_in_the_wheel(installed):
    expected = {Path(target) / path.relative_to(ROOT / source) for source, target in SOURCES.items()
                for path in (ROOT / source).rglob("*")
                if path.is_file() and "__pycache__" not in path.parts and path.name != "README.md"}
    expected |= {Path("megatron_rl") / path.relative_to(ROOT) for suffix in ("yaml", "jsonl")
                 for path in ROOT.glob(f"examples/*/*.{suffix}")}
    missing = {str(path) for path in expected if not (installed / path).is_file()}
    assert len(expected) > 250 and not missing, sorted(missing)


def test_the_three_packages_are_typed_and_have_one_version(installed):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    said = email.message_from_string(metadata.read_text(encoding="utf-8"))
    assert said["Version"] == c3po.__version__ == megatron_rl.__version__
    assert all((installed / name / "py.typed").is_file() for name in ("c3po", "rl_kernels", "megatron_rl"))
    assert said["Description-Content-Type"] == "text/markdown" and said.get_payload().startswith("# megatron_rl")
    assert [line for line in said.get_all("Requires-Dist") if "extra ==" not in line] == ["torch>=2.6"]


def test_an_installed_package_is_no_source_tree(installed):
    assert source_tree(installed / "megatron_rl") is None
    assert source_tree(ROOT / "megatron_rl") == ROOT


@pytest.mark.parametrize(("words", "said"), [
    (["rl", "--check", "experiment=quickstart", "model.architecture=ling_lite"], "16.80B parameters"),
    (["config", "show", "experiment=domains"], "megatron_rl/examples/table3_domain_conflict/code.jsonl"),
    (["ablate", "table3_domain_conflict", "scale=tiny", "seeds=0", "--check"], "math only"),
])
def test_the_installed_program_finds_its_files_from_any_folder(installed, tmp_path, words, said):
    done = program(installed, tmp_path, *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert said in done.stdout
    assert not list(tmp_path.iterdir())


def test_it_does_not_write_results_into_an_installed_package(installed, tmp_path):
    done = program(installed, tmp_path, "ablate", "table3_domain_conflict", "--readme")
    assert done.returncode == 2 and "--readme writes into the source tree's examples" in done.stderr


def test_a_base_install_has_c3po_and_says_which_extras_a_command_needs(installed, tmp_path):
    assert program(installed, tmp_path, "quickstart", "--help", base=True).returncode == 0
    version = program(installed, tmp_path, "--version", base=True)
    assert version.stdout == f"megatron-rl {c3po.__version__}\n"
    refused = program(installed, tmp_path, "config", "show", base=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "a base install brings torch alone" in refused.stderr and "trainer,rewards,report" in refused.stderr


def test_the_version_has_one_home():
    homes = {str(path.relative_to(ROOT)) for path in [ROOT / "setup.py", *(path for source in list(SOURCES)[:3]
             for path in (ROOT / source).rglob("*.py"))]
             if any(isinstance(node, ast.Constant) and node.value == c3po.__version__
                    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))}
    assert homes == {"c3po/version.py"}
