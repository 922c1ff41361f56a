"""Engines start, report why they die, sample reproducibly when asked to, and leave no process behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from megatron_rl.config.rollout import ENGINE_KEY, EngineConfig
from megatron_rl.rollout.engine_command import engine_command
from megatron_rl.rollout.engines import EngineError, EngineProcess, group_members
from megatron_rl.rollout.ports import choose_port
from megatron_rl.rollout.sampling import GenerateResult, SamplingParams
from tests.engine.conftest import PROMPTS, ROLLOUT, client_of, running

REPOSITORY = Path(__file__).resolve().parents[2]
DETERMINISTIC = replace(ROLLOUT, engine=replace(ROLLOUT.engine, deterministic=True))

# A trainer of its own: starts an engine, says which, and waits to be killed.
PARENT = """
import sys, time
from megatron_rl.rollout.engines import EngineProcess
from tests.engine.test_engines import DETERMINISTIC
process = EngineProcess.from_config(DETERMINISTIC, sys.argv[1], log_path=sys.argv[2])
process.start()
print(process.pid, process.base_url, flush=True)
time.sleep(600)
"""


def wait_until_gone(process_group: int, timeout_s: float) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while (members := group_members(process_group)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return members


def wait_until_logged(process: EngineProcess, text: str) -> None:
    while text not in process.log_tail():
        assert process.alive
        time.sleep(0.05)


def generate_seeded(base_url: str, seeds: list[int], *, shuffle: int) -> dict[tuple[int, int], GenerateResult]:
    """Every prompt with every seed, all in flight at once, in an order drawn from `shuffle`."""
    keys = [(prompt, seed) for prompt in range(len(PROMPTS)) for seed in seeds]
    random.Random(shuffle).shuffle(keys)
    sampling = SamplingParams(temperature=1.0, max_new_tokens=12, ignore_eos=True)

    async def generate_all() -> list[GenerateResult]:
        async with client_of(base_url) as client:
            return await asyncio.gather(*(
                client.generate(PROMPTS[prompt], rid=f"{shuffle}-{prompt}-{seed}", sampling=sampling.with_seed(seed))
                for prompt, seed in keys))

    return dict(zip(keys, asyncio.run(generate_all()), strict=True))


def bits(results: dict[tuple[int, int], GenerateResult]) -> dict[tuple[int, int], bytes]:
    return {key: result.output_ids.tobytes() + result.logprobs.tobytes() for key, result in results.items()}


@pytest.mark.timeout(600)
def test_deterministic_engine_and_its_end(model_folder: Path, tmp_path: Path):
    """Sampling is a function of (weights, prompt, seed), bit for bit, across processes and traffic.

    The second engine belongs to a parent that is killed with SIGKILL, the first is stopped with a request in
    flight; neither leaves a process. One test, because engines take long to start; both start together.
    """
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(model_folder), str(tmp_path / "second.log")],
                              stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY)
    first = EngineProcess.from_config(DETERMINISTIC, model_folder, log_path=tmp_path / "first.log")
    second_group = None
    try:
        first.start()
        second_pid, second_url = parent.stdout.readline().split()
        second_group = int(second_pid)
        first.wait_until_healthy()
        alone = generate_seeded(first.base_url, [1, 2], shuffle=0)
        wait_until_answering(second_url)
        mixed = generate_seeded(second_url, [1, 2, 3], shuffle=1)
        assert bits(alone) == {key: value for key, value in bits(mixed).items() if key[1] != 3}
        assert bits(generate_seeded(first.base_url, [1, 2], shuffle=2)) == bits(alone)
        for prompt in range(len(PROMPTS)):
            assert not np.array_equal(alone[prompt, 1].output_ids, alone[prompt, 2].output_ids)

        seconds = {pid: sum(psutil.Process(pid).cpu_times()[:2]) for pid in group_members(second_group)}
        assert len(seconds) >= 3  # server, scheduler, detokenizer
        assert min(seconds.values()) < 0.3 * seconds[second_group], "each imported everything"
        parent.send_signal(signal.SIGKILL)
        assert wait_until_gone(second_group, timeout_s=60.0) == []

        group = first.pid
        leave_a_request_running(first.base_url)
        first.stop_timeout_s = 1.0
        first.stop()
        assert group_members(group) == [] and not first.alive
    finally:
        parent.kill()
        first.stop()
        if second_group is not None and group_members(second_group):
            os.killpg(second_group, signal.SIGKILL)


def wait_until_answering(base_url: str) -> None:
    async def wait() -> None:
        async with client_of(base_url) as client:
            while not await client.is_healthy():
                await asyncio.sleep(0.25)

    asyncio.run(asyncio.wait_for(wait(), DETERMINISTIC.engine.start_timeout_s))


def leave_a_request_running(base_url: str) -> None:
    sampling = SamplingParams(temperature=1.0, max_new_tokens=480, ignore_eos=True)

    async def start() -> None:
        async with client_of(base_url) as client:
            request = await running(client, (5, 6), rid="in-flight", sampling=sampling)
            request.cancel()

    asyncio.run(start())


def test_engine_that_dies_shows_the_end_of_its_log(tmp_path: Path):
    process = EngineProcess.from_config(ROLLOUT, tmp_path / "no_such_model", log_path=tmp_path / "engine.log")
    with pytest.raises(EngineError, match=r"exited with code [^;]*; the end of .*engine.log:\n(.*\n)*.*no_such_model"):
        with process:
            pass
    assert process.pid is None


def test_engine_that_does_not_answer_in_time_is_ended(tmp_path: Path):
    command = [sys.executable, "-c", "import time; print('loading for ever', flush=True); time.sleep(600)"]
    process = EngineProcess(command, dict(os.environ), port=choose_port(None), log_path=tmp_path / "engine.log",
                            start_timeout_s=0.5, stop_timeout_s=5.0)
    process.start()
    group = process.pid
    wait_until_logged(process, "for ever")
    with pytest.raises(EngineError, match=r"start_timeout_s=0.5; the end of .*:\nloading for ever"):
        process.wait_until_healthy()
    process.stop()
    assert group_members(group) == []


def test_engine_that_ignores_sigterm_is_killed(tmp_path: Path):
    command = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
               "print('deaf', flush=True); time.sleep(600)"]
    process = EngineProcess(command, dict(os.environ), port=choose_port(None), log_path=tmp_path / "engine.log",
                            stop_timeout_s=0.5)
    process.start()
    group = process.pid
    wait_until_logged(process, "deaf")
    process.stop()
    assert group_members(group) == []


def test_taken_port_is_refused_by_its_key():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        config = replace(ROLLOUT, engine=EngineConfig(port=port))
        with pytest.raises(ValueError, match=f"rollout.engine.port={port} is taken"):
            EngineProcess.from_config(config, "model", log_path="unused.log")


def test_engine_does_not_inherit_torchruns_rendezvous(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    _, environment = engine_command(ROLLOUT.engine, ROLLOUT, "model", 1234)
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"} & environment.keys()


def test_cuda_engines_take_the_gpus_one_after_the_other():
    engine = replace(ROLLOUT.engine, device="cuda", count=2, tp=2, first_gpu=3)
    argv, _ = engine_command(engine, ROLLOUT, "model", 1234, number=1)
    assert argv[argv.index("--tp-size") + 1] == "2"
    assert argv[argv.index("--base-gpu-id") + 1] == "5"  # 3 and 4 belong to the first


@pytest.mark.skipif(torch.cuda.device_count() > 99, reason="there are as many GPUs")
def test_too_few_gpus_are_named_by_their_keys():
    config = replace(ROLLOUT, engine=replace(ROLLOUT.engine, device="cuda", count=2, first_gpu=99))
    with pytest.raises(ValueError, match=r"count=2 .*tp=1 .*first_gpu=99 .*need 101 GPUs, this machine has"):
        EngineProcess.from_config(config, "model", log_path="unused.log", number=1)


def test_the_key_is_in_the_environment_and_not_in_the_arguments(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("THEIR_KEY", "secret")
    argv, environment = engine_command(replace(ROLLOUT.engine, api_key_env="THEIR_KEY"), ROLLOUT, "model", 1234)
    assert environment[ENGINE_KEY] == "secret" and "secret" not in " ".join(argv)


def test_cuda_engine_is_plain_sglang():
    engine = replace(ROLLOUT.engine, device="cuda", deterministic=True)
    argv, environment = engine_command(engine, ROLLOUT, "model", 1234, model_dtype="bfloat16")
    assert argv[argv.index("--max-running-requests") + 1] == "32"
    assert "--attention-backend" not in argv and "SGLANG_USE_CPU_ENGINE" not in environment
