"""Whole runs with agents through the command line: real ranks and a real engine, killed while sessions are open."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from examples.agent_calculator.learn import write_tokenizer
from megatron_rl.config.load import load
from megatron_rl.launch.local import rank_environment
from megatron_rl.model.checkpoint_files import saved_steps
from megatron_rl.model.fresh import bailing_config, random_weights
from megatron_rl.model.hf_folder import write_hf_folder
from megatron_rl.rollout.engines import EngineProcess
from megatron_rl.rollout.ports import choose_port
from tests.engine.faulty_proxy import FaultyProxy
from tests.engine.kills import Kill, differences, run_programs, was_killed
from tests.engine.test_runs import kill_launcher, rows, wait_for_rows
from tests.examples.test_agent_verifiers import INTERPRETER, SERVER, environment_of, needs_verifiers
from tests.megatron_rl.environment.test_agents import with_words

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
AGENT = ROOT / "tests" / "megatron_rl" / "environment" / "agents_of_tests.py"
PHI, SESSIONS, STEPS = 100, 12, 3
SETTINGS = [
    "experiment=quickstart", f"run.steps={STEPS}", "run.save_every_steps=1", "run.keep_checkpoints=99",
    "eval.every_steps=0", "eval.problems=2", "rollout.prompts_per_step=3", "rollout.responses_per_prompt=4",
    f"algo.phi={PHI}", "algo.router_replay=rollout", "observe.metrics=[]", "observe.wandb=off",
    "observe.progress=false", "rollout.engine.deterministic=true", "rollout.engine.start_timeout_s=900",
    "rollout.agent.kind=command", f"rollout.agent.command=[{sys.executable},{AGENT},branches]",
    "rollout.agent.sequences=individual",
]


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "megatron_rl.cli", "rl", *overrides]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """With a model that has a chat template, and an engine."""
    folder = tmp_path_factory.mktemp("agents")
    config = bailing_config(vocab_size=len(write_tokenizer(folder / "tokenizer")), num_hidden_layers=2)
    write_hf_folder(folder / "init", config, random_weights(config, 0), tokenizer_from=folder / "tokenizer")
    settings = [*SETTINGS, f"model.path={folder / 'init'}"]
    rollout = load(settings).rollout
    with EngineProcess.from_config(rollout, folder / "init", log_path=folder / "engine.log",
                                   return_routed_experts=True) as engine:
        yield [*settings, f"rollout.engine.urls=[{engine.base_url}]"]


@pytest.fixture(scope="module")
def whole_run(settings, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = subprocess.run(command(*settings, f"run.dir={run_dir}"), cwd=ROOT, env=rank_environment(),
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_run_trains_every_turn_of_its_agents_on_the_sampled_tokens(whole_run):
    """Four turns in three sequences for each response. The trainer gives every trained token the probability that the
    engine sampled it with, and sends it through the engine's experts."""
    steps = rows(whole_run)
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    for row in steps:
        assert row["agent/sessions"] == SESSIONS * row["budget/collect_rounds"]
        assert row["agent/turns_mean"] == 4 and row["agent/turns_off_path"] == row["agent/misses"] == 0
        assert row["train/selected_tokens"] == row["budget/selected_tokens"] == PHI
        assert row["rollout/generated_tokens"] == PHI + row["budget/dropped_tokens"]
        assert row["rollout/dropped_tokens"] == 0
        assert row["mismatch/max_abs"] < 1e-4 and row["rollout/failed_fraction"] == 0
        assert row["router/replay_differing"] == 0
    assert steps[0]["train/grad_norm"] > 0


def test_turns_go_on_over_steps_with_their_experts(settings, tmp_path):
    """rollout.collector=partial in slices of 3 tokens: a step ends in the middle of turns of 6, and in the middle of
    conversations; until the first publish the trainer agrees with every token and every expert."""
    done = subprocess.run(command(*settings, f"run.dir={tmp_path}", "rollout.collector=partial", "algo.mismatch=tis",
                                  "rollout.slice_tokens=3", "algo.max_collect_rounds=20"), cwd=ROOT,
                          env=rank_environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    steps, carried = rows(tmp_path), 0
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    for row in steps:
        assert row["train/selected_tokens"] == PHI and row["rollout/failed_fraction"] == 0
        assert row["rollout/generated_tokens"] == PHI * row["budget/collect_rounds"]
        assert carried + row["rollout/generated_tokens"] == (
            PHI + row["budget/dropped_tokens"] + row["rollout/dropped_tokens"] + row["rollout/carried_tokens"])
        carried = row["rollout/carried_tokens"]
        assert row["agent/misses"] == 0 and row["agent/turns_mean"] == 4
    assert steps[0]["mismatch/max_abs"] < 1e-4 and steps[0]["router/replay_differing"] == 0
    assert carried > 0 and max(row["rollout/staleness_max"] for row in steps) > 0


def test_both_sides_of_a_debate_train(settings, tmp_path):
    """examples/agent_debate: two conversations of two turns in each session, without a word on another path."""
    done = subprocess.run(command(*settings, f"run.dir={tmp_path}", "run.steps=1", "rollout.agent.kind=python",
                                  "rollout.agent.command=[]",
                                  "rollout.agent.function=examples.agent_debate.debate.debate"), cwd=ROOT,
                          env=rank_environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    [row] = rows(tmp_path)
    assert row["agent/turns_mean"] == 4 and row["agent/turns_off_path"] == row["agent/misses"] == 0
    assert row["train/selected_tokens"] == PHI and row["mismatch/max_abs"] < 1e-4
    assert row["rollout/failed_fraction"] == 0


@needs_verifiers
def test_an_environment_of_verifiers_trains_a_model(settings, tmp_path):
    """One step; verifiers holds the conversations and judges them, and the trainer agrees with every token."""
    python, port = Path(os.environ[INTERPRETER]), choose_port(None)
    problems = tmp_path / "problems.jsonl"
    problems.write_bytes(subprocess.check_output([python, SERVER, "problems", "backwards_v1"]))
    key = {"MEGATRON_RL_GATEWAY_KEY": "a key of both"}
    server = subprocess.Popen([python, SERVER, "play", "backwards_v1", f"http://127.0.0.1:{port}", "4"],
                              env={**environment_of(python), **key})
    try:
        done = subprocess.run(
            command(*settings, f"run.dir={tmp_path / 'run'}", "run.steps=1", "rollout.agent.kind=http",
                    "rollout.agent.command=[]", f"rollout.agent.port={port}", "data.source=jsonl",
                    f"data.path={problems}", "rollout.max_context_tokens=400"),
            cwd=ROOT, env={**rank_environment(), **key}, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        assert server.wait(60) == 0, "it ends with the run"
    finally:
        server.kill()
    [row] = rows(tmp_path / "run")
    assert row["agent/sessions"] == SESSIONS * row["budget/collect_rounds"] and row["rollout/failed_fraction"] == 0
    assert row["train/selected_tokens"] == PHI and row["mismatch/max_abs"] < 1e-4


def test_killed_while_sessions_are_open_a_run_ends_as_if_nothing_had_happened(settings, whole_run, tmp_path):
    """First all of it is killed, and resumed; then the orchestrator alone, which is started again. The agents of the
    step begin again from their first message, and nothing is counted twice."""
    run_dir = tmp_path / "killed"
    *same, url = [f"run.dir={run_dir}", *settings]
    with FaultyProxy(url.split("[")[1][:-1], hold=lambda: len(rows(run_dir)) >= 1) as proxy:
        process = subprocess.Popen(command(*same, f"rollout.engine.urls=[{proxy.url}]"), cwd=ROOT,
                                   env=rank_environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
        wait_for_rows(run_dir, 1, process)
        while not (saved_steps(run_dir / "checkpoints")  # what is saved after the row; then the agents of step 2
                   and with_words(str(AGENT), psutil.Process(process.pid).children(recursive=True))):
            assert process.poll() is None, f"the run ended early:\n{process.stderr.read()}"
            time.sleep(0.05)
        kill_launcher(process)  # which looks for agents that outlive it, too
    assert saved_steps(run_dir / "checkpoints") == [1]
    config = load([*same, url, "run.resume=true", "orchestrator.wait_timeout_s=300"])
    said = run_programs(config, Kill("sampling", 2, entry=5, program="orchestrator"))
    assert said == "" and "sampling" in was_killed(config)["inside"]
    assert differences(whole_run, run_dir) == []
