"""Whatever the trainer's layout and the transport, the engines serve what an engine loaded from the export serves."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.config.load import load, to_dict
from megatron_rl.config.rollout import EngineConfig, RolloutConfig
from megatron_rl.launch.local import rank_environment
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.ports import choose_port
from megatron_rl.rollout.supervisor import Supervisor
from tests.engine.conftest import client_of
from tests.engine.publish_worker import PROBE
from tests.tiny_models import write_tiny_bailing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {
    "ep2": ["parallel.world_size=2", "parallel.ep=2"],
    "tp2_ep2": ["parallel.world_size=2", "parallel.tp=2", "parallel.ep=2"],  # with sequence parallelism
    "pp2_ep2": ["parallel.world_size=4", "parallel.pp=2", "parallel.ep=2"],
}
ENGINE = EngineConfig(max_running_requests=4, max_total_tokens=2048, start_timeout_s=900.0)
ROLLOUT = RolloutConfig(max_context_tokens=128, engine=ENGINE)


@dataclasses.dataclass
class Served:
    """urls: two engines for publishes; reference: log-probabilities of an engine that loaded `folder` by itself."""

    folder: Path
    urls: tuple[str, ...]
    reference: np.ndarray
    version: int = 0


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("publish")
    folder = write_tiny_bailing(root / "trained", seed=7, norm_head=True)
    other = write_tiny_bailing(root / "other", seed=8, norm_head=True)
    with ExitStack() as stack:
        processes: list[EngineProcess] = []
        for path in (other, other, folder):
            process = EngineProcess.from_config(ROLLOUT, path, log_path=root / f"engine-{len(processes)}.log",
                                                taken_ports=[process.port for process in processes])
            stack.enter_context(Supervisor([process], ENGINE))
            processes.append(process)
        reference = asyncio.run(logprobs(processes[2].base_url))
        yield Served(folder, tuple(process.base_url for process in processes[:2]), reference)


async def logprobs(url: str) -> np.ndarray:
    async with client_of(url) as client:
        return await client.input_logprobs(PROBE, rid="probe.")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_engines_serve_what_a_fresh_engine_loads_from_the_export(layout, served, tmp_path):
    config = load(["experiment=quickstart", "parallel=single", *LAYOUTS[layout], f"model.path={served.folder}",
                   f"run.dir={tmp_path}", f"rollout.engine.urls=[{','.join(served.urls)}]"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={config.parallel.world_size}",
         "--master-addr=127.0.0.1", f"--master-port={choose_port(None)}", "-m", "tests.engine.publish_worker",
         str(path), str(served.version + 1)],
        cwd=ROOT, env=rank_environment(), check=True, timeout=600)
    served.version += 6
    for transport in ("tensor", "broadcast", "disk"):
        for found in json.loads((tmp_path / f"{transport}.json").read_text()):
            np.testing.assert_allclose(found, served.reference, rtol=0, atol=1e-5, err_msg=transport)
    exported, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", served.folder))
    assert exported.keys() == source.keys()
    assert all(torch.equal(exported[name], source[name]) for name in source)
