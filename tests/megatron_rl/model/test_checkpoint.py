"""Saving in the background, and saves that fail: one rank with a real policy and optimiser."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rl import topology
from megatron_rl.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from megatron_rl.handoff import dump, load
from megatron_rl.model.architectures import read_config
from megatron_rl.model.build import build_policy
from megatron_rl.model.checkpoint import ORCHESTRATOR_STATE, Checkpoints
from megatron_rl.model.checkpoint_files import DamagedCheckpoint, choose, read_whole
from megatron_rl.model.convert import load_hf
from megatron_rl.train_step.optimizer import build_optimizer
from tests.tiny_models import write_tiny_bailing

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]


class SlowWrites(Checkpoints):
    """Background writes wait until `go` is set."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.go = threading.Event()

    def _write(self, *arguments):
        assert self.go.wait(300)
        return super()._write(*arguments)


class Run:
    """One rank: `train` changes every weight and moment; `saves` are its checkpoints."""

    def __init__(self, model: Path, run_dir: Path, checkpoints=Checkpoints, **run):
        self.config = RunConfig(dir=str(run_dir), **run)
        parallel = ParallelConfig()
        here = topology.start(parallel, seed=0)
        self.policy = build_policy(read_config(model), ModelConfig(path=str(model)), parallel, with_gradients=True)
        load_hf(self.policy, here, model)
        self.optimizer = build_optimizer(self.policy, OptimizerConfig(lr=0.01), parallel)
        self.saves = checkpoints(self.config, self.policy, self.optimizer, here)
        self.names = [name for name, _ in self.policy.gpt_models[0].named_parameters()]

    def train(self, size: float = 1.0) -> None:
        for parameter in self.policy.gpt_models[0].parameters():
            parameter.main_grad.fill_(size)
        self.optimizer.step()

    def restore(self) -> dict:
        return self.saves.restore(choose(self.saves._run))

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.policy.gpt_models[0].parameters()]

    def saved(self) -> list[str]:
        return sorted(path.name for path in self.saves.folder.iterdir())


@pytest.fixture
def started(tmp_path_factory) -> Iterator:
    model = write_tiny_bailing(tmp_path_factory.mktemp("model") / "tiny", hidden_size=32, moe_intermediate_size=16,
                               num_experts=2)
    runs = []

    def start(run_dir: Path, **options) -> Run:
        if runs:
            topology.stop()
        runs.append(Run(model, run_dir, **options))
        return runs[-1]

    yield start
    topology.stop()


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow beyond num_bytes (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_background_save_holds_the_state_of_its_step_while_training_goes_on(started, tmp_path):
    run = started(tmp_path, checkpoints=SlowWrites, async_save=True)
    run.train()
    at_save = run.weights()
    run.saves.save(1, {})
    run.train()
    run.saves.poll()
    assert run.saved() == ["step_00000001.partial"]  # nothing waits for it
    after = run.weights()
    run.saves.go.set()
    run.saves.save(2, {})  # finishes the earlier one first
    run.saves.finish()
    assert run.saved() == ["step_00000001", "step_00000002"]

    for name, weights in (("step_00000001", at_save), ("step_00000002", after)):
        again = started(tmp_path, resume=True, resume_from=name)
        again.restore()
        assert same(again.weights(), weights) and not same(at_save, after)
        again.train()
        if name == "step_00000001":  # one step more than step 1 is step 2, moments and counters included
            assert same(again.weights(), after)
            os.rename(tmp_path / "checkpoints/step_00000002.aside1", tmp_path / "checkpoints/step_00000002")


def test_a_finished_background_save_counts_from_the_next_poll(started, tmp_path):
    run = started(tmp_path, async_save=True)
    run.saves.save(1, {})
    run.saves._pending.written.result(300)
    run.saves.poll()
    assert run.saved() == ["step_00000001"]


@pytest.mark.parametrize("in_background", [False, True], ids=["waiting", "background"])
def test_a_file_that_cannot_be_written_is_named_and_the_last_checkpoint_stays(started, tmp_path, in_background):
    run = started(tmp_path, async_save=in_background)
    run.train()
    run.saves.save(1, {"updates_done": 1})
    run.saves.finish()
    at_save = run.weights()
    run.train()
    with files_of_at_most(5000), pytest.raises(OSError, match=(
            r"checkpoint of step 2 could not be saved: rank 0: OSError: \[Errno 27\] File too large: "
            r"'.*step_00000002.partial/rank_00000.safetensors'; earlier checkpoints in .* are whole")):
        run.saves.save(2, {})
        assert in_background
        run.saves._pending.written.exception(300)
        run.saves.poll()  # where the next step of a run would see it
    assert run.saved() == ["step_00000001"]

    again = started(tmp_path, resume=True)
    assert again.restore()["updates_done"] == 1
    assert same(again.weights(), at_save)
    again.saves.save(2, {})  # there is room again
    again.saves.finish()
    assert again.saved() == ["step_00000001", "step_00000002"]


FULL_DISK = """
import sys
from pathlib import Path
from tests.megatron_rl.model.test_checkpoint import Run, topology
run = Run(Path(sys.argv[1]), Path(sys.argv[2]))
run.saves.save(1, {})
filler = Path(sys.argv[2], "filler").open("wb", buffering=0)
while True:
    try:
        filler.write(bytes(4096))
    except OSError:
        break
try:
    run.saves.save(2, {})
except OSError as error:
    print(error)
print(run.saved())
topology.stop()
print(Run(Path(sys.argv[1]), Path(sys.argv[2]), resume=True).restore()["step"])
"""


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path):
    """On a file system of 2 MB, mounted in a namespace of its own."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a user mount a file system (unshare -rm)")
    model = write_tiny_bailing(tmp_path / "tiny", hidden_size=32, moe_intermediate_size=16, num_experts=2)
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=2m none {disk} && exec "$0" -c "$1" {model} {disk}',
         sys.executable, FULL_DISK],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}, capture_output=True, text=True,
        timeout=600)
    assert done.returncode == 0, done.stderr
    message, saved, step = done.stdout.splitlines()[-3:]
    assert "checkpoint of step 2 could not be saved: rank 0: OSError: [Errno 28] No space left on device" in message
    assert "rank_00000.safetensors" in message
    assert "step_00000001" in saved and "step_00000002" not in saved and step == "1"


def test_a_flipped_bit_anywhere_is_refused_before_anything_is_loaded(started, tmp_path):
    """In every file, at its beginning, its end and places in between."""
    run = started(tmp_path)
    run.train()
    run.saves.save(1, {"updates_done": 1})
    run.saves.save(2, {"updates_done": 2}, {ORCHESTRATOR_STATE: dump({"collector": [1, 2]})})
    newest = tmp_path / "checkpoints/step_00000002"
    names = sorted(path.name for path in newest.iterdir())
    assert names == ["loop.json", "manifest.json", "manifest.sha256", "orchestrator.safetensors", "random.pt",
                     "rank_00000.safetensors"]
    again = started(tmp_path, resume=True)
    before, chance = again.weights(), random.Random(0)
    for name in names:
        whole = (newest / name).read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(3))):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << chance.randrange(8)
            (newest / name).write_bytes(flipped)
            with pytest.raises(DamagedCheckpoint, match=rf"{name}.* has changed .* run.resume_from=step_00000001"):
                again.restore()
        (newest / name).write_bytes(whole)
    assert same(again.weights(), before)
    assert again.restore()["updates_done"] == 2
    assert load(read_whole(newest, ORCHESTRATOR_STATE)) == {"collector": [1, 2]}
    with pytest.raises(ValueError, match="holds no orchestrator.safetensors"):
        read_whole(newest.with_name("step_00000001"), ORCHESTRATOR_STATE)
    (newest / ORCHESTRATOR_STATE).write_bytes(flipped)
    with pytest.raises(DamagedCheckpoint, match="orchestrator.safetensors has .* run.resume_from=step_00000001"):
        read_whole(newest, ORCHESTRATOR_STATE)
