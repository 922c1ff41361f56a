"""Runs the layouts of cases.py, one start of the worker per world size, when the first test asks for one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tests.distributed.cases as cases
from tests.distributed.lora_cases import LORA_CASES, LoraReference, cases_in
from tests.distributed.networks import MTP_NETWORKS, NETWORKS, WrittenNetwork
from tests.distributed.reference_step import Reference, fill_logprobs, reference_step
from tests.distributed.table import RED, table

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 840


@dataclass
class Layouts:
    """The step, its reference, and (run on demand) what each layout made of it."""

    folder: Path
    step: cases.Step
    start: dict[str, torch.Tensor]
    configs: dict[bool, dict]
    reference: Reference
    _networks: dict[str, WrittenNetwork] = field(default_factory=dict)
    _results: dict[str, dict[str, dict]] = field(default_factory=dict)  # what -> layout -> what it made of it
    _lora_references: dict[str, LoraReference] = field(default_factory=dict)
    _failed: dict[tuple[str, int], str] = field(default_factory=dict)  # so that a failure is waited for once

    def __getitem__(self, layout: str) -> dict:
        return self._made("step", layout, "{}.pt")

    def networks(self, layout: str) -> dict[str, dict]:
        """What the layout made of each of NETWORKS that it can hold."""
        return self._made("networks", layout, "{}.networks.pt", self.network, NETWORKS)

    def lora(self, layout: str) -> dict[str, dict]:
        """What the layout made of each of its LORA_CASES."""
        return self._made("lora", layout, "{}.lora.pt", self.lora_reference, cases_in(layout))

    def mtp(self, layout: str) -> dict[str, dict]:
        """What the layout made of each of MTP_NETWORKS, by whether the layer behind the last trains."""
        return self._made("mtp", layout, "{}.mtp.pt", self.network, MTP_NETWORKS)

    def _made(self, what: str, layout: str, file: str, write: Callable[[str], object] | None = None,
              names: Iterable[str] = ()) -> dict:
        """What the layout made of `what`. write: writes each of `names`, which the worker reads, before it starts."""
        results = self._results.setdefault(what, {})
        if layout not in results:
            for name in names:
                write(name)
            self._run(what, layout, results, file)
        return results[layout]

    @property
    def results(self) -> dict[str, dict]:
        """What the layouts that were run made of the step."""
        return self._results.get("step", {})

    def lora_reference(self, name: str) -> LoraReference:
        """One of LORA_CASES, whose step is written under `folder` when it is first asked for."""
        if name not in self._lora_references:
            case = LORA_CASES[name]
            self._lora_references[name] = LoraReference(self.folder, self.network(case.network), case)
        return self._lora_references[name]

    def network(self, name: str) -> WrittenNetwork:
        """One of NETWORKS, written under `folder` when it is first asked for."""
        if name not in self._networks:
            self._networks[name] = WrittenNetwork(self.folder, name)
        return self._networks[name]

    def _run(self, what: str, layout: str, results: dict[str, dict], file: str) -> None:
        """Run `what` in all layouts of the given one's world size, in one start of the worker."""
        world_size = cases.LAYOUTS[layout]["world_size"]
        names = [name for name, sizes in cases.LAYOUTS.items() if sizes["world_size"] == world_size]
        if (what, world_size) in self._failed:
            pytest.fail(self._failed[what, world_size], pytrace=False)
        try:
            run_worker(("tests.distributed.worker", what), self.folder, world_size, names)
        except pytest.fail.Exception as failure:
            self._failed[what, world_size] = str(failure)
            raise
        for name in names:
            results[name] = torch.load(self.folder / file.format(name))


def run_worker(worker: tuple[str, ...], folder: Path, world_size: int, layouts: list[str]) -> None:
    """One start of a worker, a module and its first arguments; a failure of its fails the test with its last words."""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}",
                   "CUDA_VISIBLE_DEVICES": ""}  # the ranks are forked, and this is about arithmetic over gloo
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", *worker, str(folder), str(world_size), *layouts],
            cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"the worker of {world_size} processes took more than {TIMEOUT_S} s:\n{str(late.stderr)[-2000:]}",
                    pytrace=False)
    if done.returncode:
        pytest.fail(f"the worker of {world_size} processes failed:\n{done.stderr[-4000:]}", pytrace=False)


_TABLE = pytest.StashKey[Layouts]()


def pytest_terminal_summary(terminalreporter, config):
    """After the tests: the errors of all layouts that were run."""
    layouts = config.stash.get(_TABLE, None)
    if layouts is not None and layouts.results:
        terminalreporter.section("layouts against the float64 reference")
        for line in table(layouts.results, layouts.reference):
            terminalreporter.write_line(line, red=RED in line)


@pytest.fixture(scope="session")
def layouts(tmp_path_factory, pytestconfig) -> Layouts:
    folder = tmp_path_factory.mktemp("layouts")
    models = cases.write_models(folder)
    configs = {norm_head: json.loads((path / "config.json").read_text()) for norm_head, path in models.items()}
    start = load_file(models[True] / "model.safetensors")
    step = cases.draw_sequences()
    fill_logprobs(step, {name: tensor.double() for name, tensor in start.items()}, configs[True])
    torch.save(step, folder / "step.pt")
    found = Layouts(folder, step, start, configs, reference_step(step, start, configs[True]))
    pytestconfig.stash[_TABLE] = found
    return found
