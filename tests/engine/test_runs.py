"""Whole runs through the command line: real Megatron ranks, a real engine, killed and resumed."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_rl.config.load import load
from megatron_rl.launch.local import rank_environment
from megatron_rl.launch.programs import Programs, run_rl
from megatron_rl.model.checkpoint_files import saved_steps, step_name
from megatron_rl.observe.jsonl import read_jsonl
from megatron_rl.rollout.engines import EngineProcess
from tests.engine.faulty_proxy import FaultyProxy
from tests.engine.kills import Kill, differences, run_programs, timeless, was_killed
from tests.test_extending import COMMANDS as EXTENDING

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PHI = 100
SMALL = [
    "experiment=quickstart", "run.steps=4", "run.save_every_steps=2", "eval.every_steps=2", "eval.problems=4",
    "rollout.prompts_per_step=4", "rollout.responses_per_prompt=4", "rollout.max_response_tokens=16",
    "rollout.max_context_tokens=64", f"algo.phi={PHI}", "algo.updates_per_rollout=1",
    "reward.routes.math=tests.rewards.brevity", "observe.wandb=off", "rollout.engine.deterministic=true",
]


@pytest.fixture(scope="module")
def engine_url(model, tmp_path_factory):
    config = load([*SMALL, f"model.path={model}"])
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    with EngineProcess.from_config(config.rollout, model, log_path=log, return_routed_experts=True) as engine:
        yield engine.base_url


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "megatron_rl.cli", "rl", *SMALL, *overrides]


def run(*overrides: str, timeout_s: float = 600.0) -> subprocess.CompletedProcess:
    return subprocess.run(command(*overrides), cwd=ROOT, env=rank_environment(), capture_output=True, text=True,
                          timeout=timeout_s)


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    path = run_dir / name
    return read_jsonl(path) if path.exists() else []


def weights_digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "hf" / "model.safetensors").read_bytes()).hexdigest()


def wait_for_rows(run_dir: Path, count: int, process: subprocess.Popen, timeout_s: float = 600.0) -> None:
    deadline = time.monotonic() + timeout_s
    while len(rows(run_dir)) < count:
        assert process.poll() is None, f"the run ended early:\n{process.stderr.read()}"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.05)


def kill_after(steps: int, run_dir: Path, engine_url: str, *overrides: str) -> None:
    """kill -9 the launcher of a run that has logged so many steps and waits for the engine in the next."""
    with FaultyProxy(engine_url, hold=lambda: len(rows(run_dir)) >= steps) as proxy:
        process = subprocess.Popen(command(*overrides, f"rollout.engine.urls=[{proxy.url}]"), cwd=ROOT,
                                   env=rank_environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
        wait_for_rows(run_dir, steps, process)
        kill_launcher(process)


def kill_launcher(process: subprocess.Popen) -> None:
    """kill -9; none of its ranks outlives it."""
    family, deadline = psutil.Process(process.pid).children(recursive=True), time.monotonic() + 120
    process.kill()
    while alive := [one for one in family if lives(one)]:
        assert time.monotonic() < deadline, f"outlived a killed launcher: {alive}"
        time.sleep(0.05)
    process.wait()
    process.stderr.close()


def lives(one: psutil.Process) -> bool:
    """Whether the process still runs. torch_shm_manager does not count: it holds the last published bucket for as long
    as the engine has it open, and the engine lives on here."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return one.is_running() and one.status() != psutil.STATUS_ZOMBIE and one.name() != "torch_shm_manager"
    return False


@pytest.fixture(scope="module")
def whole_run(model, engine_url, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = run(f"model.path={model}", f"run.dir={run_dir}", f"rollout.engine.urls=[{engine_url}]")
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_small_file_as_the_world_has_it_trains_and_nothing_is_evaluated(model, engine_url, tmp_path):
    lines = [{"q": {"text": f"Q:{i}+1\nA:"}, "reward_model": {"ground_truth": i + 1}, "level": None}
             for i in range(1, 6)]
    path = tmp_path / "own.data"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(lines).encode()))
    done = run(f"model.path={model}", f"run.dir={tmp_path / 'run'}", f"rollout.engine.urls=[{engine_url}]",
               "data.source=jsonl", f"data.path={path}", "data.prompt_key=q.text", "data.split=all", "run.steps=1",
               "data.answer_key=reward_model.ground_truth", "eval.problems=0")
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "run")) == 1 and not rows(tmp_path / "run", "eval.jsonl")
    assert (tmp_path / "run" / "report.html").is_file()


def test_every_function_of_the_page_on_extending_takes_part_in_a_run(model, engine_url, tmp_path):
    """All commands of docs/extending.md at once, with what the page says that each of them does."""
    keys = {word.partition("=")[0]: word for line in EXTENDING for word in shlex.split(line)
            if word.startswith(("algo.hooks", "reward.shaping", "observe.", "eval.functions", "data."))}
    environment = {**rank_environment(), "PYTHONPATH": os.pathsep.join(
        [str(ROOT / "examples" / "extending"), rank_environment().get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command(f"model.path={model}", f"run.dir={tmp_path / 'run'}", f"rollout.engine.urls=[{engine_url}]"),
         *keys.values(), "run.steps=2", "eval.problems=4", "algo.max_collect_rounds=50"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    steps, run_dir = rows(tmp_path / "run"), tmp_path / "run"
    assert len(steps) == 2 and all(0 <= row["extra/brief_share"] <= 1 for row in steps)
    assert all(-0.1 <= row["reward/shaping/repetition_penalty"] <= 0 for row in steps)
    assert all(0 <= row["own/tables"] <= 1 for row in rows(run_dir, "eval.jsonl"))
    assert [json.loads(line)["step"] for line in (tmp_path / "longest.jsonl").read_text().splitlines()] == [0, 1]
    logged = [line.split(",") for line in (run_dir / "numbers.csv").read_text().splitlines()]
    told = {(int(step), name): float(value) for step, name, value in logged}
    for row in steps:
        for name in ("reward/mean", "extra/brief_share", "budget/selected_tokens"):
            assert told[row["step"], name] == pytest.approx(row[name])
    assert (2, "eval/own/tables") in told


def test_every_step_trains_on_exactly_phi_tokens(whole_run):
    steps = rows(whole_run)
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(row["budget/selected_tokens"] == PHI for row in steps)
    assert all(row["train/selected_tokens"] == PHI for row in steps)  # counted again in the loss, over all ranks
    assert all(row["budget/fill"] == 1.0 for row in steps)
    generated = [row["rollout/generated_tokens"] for row in steps]
    assert min(generated) >= PHI and len(set(generated)) > 1, generated


def test_logged_and_documented_metrics_are_the_same(whole_run):
    page = (ROOT / "docs" / "metrics.md").read_text()
    always, sometimes = (set(re.findall(r"^\| `([a-z_]+/[^`<]+)` \|", part, flags=re.MULTILINE))
                         for part in page.split("## Only with a correction"))
    families = ("time/", "reward/status/", "router/load_max_over_mean/layer_", "extra/")  # one line for each family
    logged = {key for row in rows(whole_run) for key in row if "/" in key and not key.startswith(families)}
    assert logged - always - sometimes == set()
    assert always - logged == {"router/replay_differing"}  # only with algo.router_replay


def test_trainer_and_engine_agree_after_every_publish(whole_run):
    assert max(row["mismatch/max_abs"] for row in rows(whole_run)) < 1e-4
    assert [row["sync/version"] for row in rows(whole_run)] == [1, 2, 3, 4]
    assert all(row["sync/engines_verified"] == 1 for row in rows(whole_run)), "without being asked for"


def test_another_layout_runs_the_same_step(whole_run, model, engine_url, tmp_path):
    """Whole_run is EP2. The first step is equal up to rounding; the second shows that its publish arrived."""
    run_dir = tmp_path / "tp2"
    done = run("parallel=tp2", "run.steps=2", "eval.every_steps=0", f"model.path={model}", f"run.dir={run_dir}",
               f"rollout.engine.urls=[{engine_url}]")
    assert done.returncode == 0, done.stderr
    first, second = rows(run_dir)
    reference = timeless(rows(whole_run)[0])
    assert first["rollout/generated_tokens"] == reference["rollout/generated_tokens"]
    for key in ("train/loss", "train/entropy", "train/grad_norm", "train/balance_loss", "router/entropy"):
        assert first[key] == pytest.approx(reference[key], rel=1e-4, abs=1e-6), key
    assert second["mismatch/max_abs"] < 1e-4


def test_a_colocated_run_takes_the_same_step(whole_run, model, engine_url, tmp_path):
    """On CPU the engine is told when to release its memory and keeps it, which the log says."""
    done = run("rollout.engine.colocate=true", "run.steps=2", "eval.every_steps=0", f"model.path={model}",
               f"run.dir={tmp_path}", f"rollout.engine.urls=[{engine_url}]")
    assert done.returncode == 0, done.stderr
    first, second = rows(tmp_path)
    reference = timeless(rows(whole_run)[0])
    for key in ("rollout/generated_tokens", "train/loss", "train/grad_norm"):
        assert first[key] == reference[key], key
    assert second["mismatch/max_abs"] < 1e-4
    assert all(row[f"memory/free_bytes_{phase}"] > 0 for row in (first, second)
               for phase in ("generating", "training", "publishing", "serving"))
    assert "SGLang has no memory saver on CPU" in (tmp_path / "trainer.log").read_text()


@pytest.mark.skipif(importlib.util.find_spec("sglang_router") is None, reason="sglang-router is not installed")
def test_a_run_through_a_router_takes_the_same_step(whole_run, model, tmp_path):
    """With an engine and a router that the command starts itself, and a key between them."""
    done = run("rollout.engine.router=local", "rollout.engine.host=0.0.0.0", "run.steps=1", "eval.every_steps=0",
               f"model.path={model}", f"run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    (row,), reference = rows(tmp_path), timeless(rows(whole_run)[0])
    for key in ("rollout/generated_tokens", "train/grad_norm"):
        assert row[key] == reference[key], key


def test_a_skipped_publish_shows_as_mismatch(model, engine_url, tmp_path):
    config = load([*SMALL, "parallel=single", "run.steps=3", f"run.dir={tmp_path}", f"model.path={model}",
                   "observe.mismatch_alarm=1e-5", f"rollout.engine.urls=[{engine_url}]"])
    run_rl(config, Programs(("tests.engine.skip_one_publish",)))
    mismatch = [row["mismatch/max_abs"] for row in rows(tmp_path)]
    assert max(mismatch[:2]) < 1e-4 < 1e-3 < mismatch[2], mismatch
    assert [row["mismatch/alarm"] for row in rows(tmp_path)] == [0, 0, 1]


def test_a_run_killed_in_the_middle_ends_as_if_nothing_had_happened(whole_run, model, engine_url, tmp_path):
    run_dir = tmp_path / "killed"
    same = (f"model.path={model}", f"run.dir={run_dir}")
    kill_after(3, run_dir, engine_url, *same)
    assert [path.name for path in (run_dir / "checkpoints").glob("step_*")] == ["step_00000002"]

    resumed = run(*same, f"rollout.engine.urls=[{engine_url}]", "resume=true")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert [timeless(row) for row in rows(run_dir, name)] == [timeless(row) for row in rows(whole_run, name)]
    assert weights_digest(run_dir) == weights_digest(whole_run)


def test_killed_while_saving_and_while_training_it_ends_the_same(whole_run, model, engine_url, tmp_path):
    """With background saves; all phases, many times: make test-kills."""
    run_dir = tmp_path / "killed"
    config = load([*SMALL, f"model.path={model}", f"run.dir={run_dir}", f"rollout.engine.urls=[{engine_url}]",
                   "run.resume=true", "run.async_save=true"])
    for kill, whole in ((Kill("save", step=1, rank=1), set()), (Kill("optimiser", step=3, everything=True), {2})):
        said = run_programs(config, kill)
        struck = was_killed(config)
        assert struck is not None and kill.phase in struck["inside"], said
        assert set(saved_steps(run_dir / "checkpoints")) <= whole
    assert run_programs(config) == ""
    assert differences(whole_run, run_dir) == []


def test_a_killed_orchestrator_is_started_again_and_the_run_ends_the_same(whole_run, model, engine_url, tmp_path):
    """In one run: while it hands a step over, judges, and saves; all phases, many times: make test-kills."""
    run_dir = tmp_path / "killed"
    config = load([*SMALL, f"model.path={model}", f"run.dir={run_dir}", f"rollout.engine.urls=[{engine_url}]",
                   "orchestrator.wait_timeout_s=300"])
    kills = [Kill(phase, step, program="orchestrator") for phase, step in (
        ("handing over", 0), ("judging", 1), ("saving", 1), ("publishing", 2))]
    assert run_programs(config, *kills) == ""
    assert all(was_killed(config, number) is not None for number in range(len(kills)))
    assert differences(whole_run, run_dir) == []


def test_a_damaged_checkpoint_is_named_before_anything_starts(whole_run, model, engine_url, tmp_path):
    run_dir = tmp_path / "damaged"
    shutil.copytree(whole_run, run_dir)
    damaged = run_dir / "checkpoints" / "step_00000004" / "rank_00001.safetensors"
    os.truncate(damaged, damaged.stat().st_size // 2)
    again = run(f"model.path={model}", f"run.dir={run_dir}", f"rollout.engine.urls=[{engine_url}]", "resume=true")
    assert again.returncode == 2
    assert str(damaged) in again.stderr and "resume=true run.resume_from=step_00000002" in again.stderr


def test_a_second_run_in_the_same_folder_is_refused(whole_run, model, engine_url):
    again = run(f"model.path={model}", f"run.dir={whole_run}", f"rollout.engine.urls=[{engine_url}]")
    assert again.returncode == 2
    assert "resume=true" in again.stderr


def start(model: Path, run_dir: Path, *overrides: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A run on the user's own JSONL with an engine that the command starts itself, three steps old; and its family."""
    process = subprocess.Popen(
        command(f"model.path={model}", f"run.dir={run_dir}", "run.steps=500", "data.source=jsonl", "data.split=all",
                f"data.path={ROOT / 'examples/quickstart/problems.jsonl'}", "data.prompt_key=problem",
                "eval.problems=2", *overrides),
        cwd=ROOT, env=rank_environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_rows(run_dir, 3, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 5  # torchrun, two ranks, the engine and its children
    return process, family


def one_of(family: list[psutil.Process], wanted: Callable[[psutil.Process], bool]) -> psutil.Process:
    """Others of the family may have ended meanwhile."""
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            if wanted(one):
                return one
    raise AssertionError(f"none of {family}")


def engine_of(family: list[psutil.Process]) -> psutil.Process:
    return one_of(family, lambda one: "--model-path" in one.cmdline())


@pytest.mark.parametrize(("struck", "exit_code", "said"), [
    ("launcher", 130, "stopped"),
    ("rank", 1, "a rank was killed (SIGKILL), most likely because memory ran out"),
    ("engine", 1, "rollout.engine.wait_timeout_s"),
])
def test_what_ends_a_run_keeps_the_checkpoint_and_leaves_no_process(struck, exit_code, said, model, tmp_path):
    """Ctrl-C, the death of one rank, and of an engine that may not be started again."""
    run_dir = tmp_path / "interrupted"
    alone = ["rollout.engine.max_restarts=0", "rollout.engine.wait_timeout_s=4"] if struck == "engine" else []
    process, family = start(model, run_dir, *alone)
    if struck == "launcher":
        os.kill(process.pid, signal.SIGINT)
    elif struck == "rank":
        one_of(family, lambda one: one.name() == "rank1").kill()
    else:
        engine_of(family).kill()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == exit_code, errors
    last = saved_steps(run_dir / "checkpoints")[-1]  # 2, or later where steps are quicker than this test
    assert said in errors and "resume=true" in errors and f"step {last} in" in errors, errors
    _, alive = psutil.wait_procs(family, timeout=120)  # torch_shm_manager ends by itself a moment after its users
    assert not alive
    assert last >= 2 and (run_dir / "checkpoints" / step_name(last) / "loop.json").is_file()


def test_a_killed_engine_is_started_again_and_a_killed_launcher_leaves_no_process(model, tmp_path):
    process, family = start(model, tmp_path, "rollout.engine.health_interval_s=0.5")
    before = engine_of(family)
    before.kill()
    trained = len(rows(tmp_path)) + 1  # the step under way may have had its responses
    wait_for_rows(tmp_path, trained + 1, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert engine_of(family).pid != before.pid
    process.kill()
    assert process.wait(120) == -signal.SIGKILL
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive, f"outlived the launcher: {[one.cmdline() for one in alive]}"
    process.stderr.close()


def test_an_engine_that_cannot_start_shows_its_last_words(model, tmp_path):
    failed = run(f"model.path={model}", f"run.dir={tmp_path}", "rollout.engine.extra_args=[--no-such-flag]")
    assert failed.returncode == 1
    assert "--no-such-flag" in failed.stderr and "engine.log" in failed.stderr


def test_a_taken_port_is_named(model, tmp_path, engine_url):
    port = engine_url.rsplit(":", 1)[1]
    failed = run(f"model.path={model}", f"run.dir={tmp_path}", f"rollout.engine.port={port}")
    assert failed.returncode == 2
    assert f"rollout.engine.port={port} is taken" in failed.stderr


def test_more_memory_than_the_machine_has_is_said_before_anything_starts(model, tmp_path):
    failed = run(f"model.path={model}", f"run.dir={tmp_path}", "parallel=single", "parallel.world_size=65536")
    assert failed.returncode == 2
    assert "parallel.world_size=65536 ranks take" in failed.stderr and "megatron-rl plan" in failed.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_answer_column_is_named_with_file_and_line(model, tmp_path, engine_url):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+2", "anwser": "3"}\n')
    failed = run(f"model.path={model}", f"run.dir={tmp_path / 'run'}", "data.source=jsonl", "data.split=all",
                 f"data.path={problems}", f"rollout.engine.urls=[{engine_url}]", "reward.routes.math=math_verify")
    assert failed.returncode != 0
    assert f"{problems}:2" in failed.stderr


COLLECTORS = {
    "budgeted": ("algo.order=groups",),
    "partial": ("algo.mismatch=tis", "rollout.slice_tokens=10", "rollout.prompts_per_step=3",
                "algo.max_collect_rounds=20"),
    "async": ("algo.mismatch=tis",),
}


@pytest.mark.parametrize("collector", COLLECTORS)
def test_every_collector_fills_phi_and_accounts_for_every_token(collector, model, engine_url, tmp_path):
    """Whatever a step carries in is what the step before carried out."""
    done = run("parallel=dp2", f"rollout.collector={collector}", *COLLECTORS[collector], "eval.every_steps=0",
               f"model.path={model}", f"run.dir={tmp_path}", f"rollout.engine.urls=[{engine_url}]")
    assert done.returncode == 0, done.stderr
    steps, carried = rows(tmp_path), 0
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for row in steps:
        assert row["train/selected_tokens"] == PHI
        assert carried + row["rollout/generated_tokens"] == (
            PHI + row["budget/dropped_tokens"] + row["rollout/dropped_tokens"] + row["rollout/carried_tokens"])
        carried = row["rollout/carried_tokens"]
        assert row["rollout/staleness_max"] <= {"budgeted": 0, "partial": 4, "async": 1}[collector]
    if collector == "partial":
        assert carried > 0
        assert max(row["rollout/staleness_max"] for row in steps) > 0
    if collector == "async":
        assert {row["rollout/staleness_max"] for row in steps[1:]} == {1}
    else:
        assert steps[0]["mismatch/max_abs"] < 1e-4


def test_experts_of_continued_responses_are_replayed_in_a_run(model, engine_url, tmp_path):
    """In fp32 engine and trainer choose alike, until a response goes on under newer weights."""
    done = run("parallel=pp2", "algo.router_replay=rollout", "rollout.collector=partial", *COLLECTORS["partial"][1:],
               "algo.mismatch=icepop", "eval.every_steps=0", f"model.path={model}", f"run.dir={tmp_path}",
               f"rollout.engine.urls=[{engine_url}]")
    assert done.returncode == 0, done.stderr
    first, *later = rows(tmp_path)
    assert first["router/replay_differing"] == 0 and first["mismatch/max_abs"] < 1e-4
    assert len(later) == 3 and all(row["train/selected_tokens"] == PHI for row in later)
    assert all(row["router/replay_differing"] < 0.2 for row in later)


def test_the_second_update_of_a_rollout_replays_the_experts_of_the_pass_before_the_first(model, engine_url, tmp_path):
    done = run("parallel=ep2", "algo.router_replay=trainer", "algo.updates_per_rollout=2", "algo.phi=50",
               "optimizer.lr=0.01", "run.steps=1", "eval.every_steps=0", f"model.path={model}", f"run.dir={tmp_path}",
               f"rollout.engine.urls=[{engine_url}]")
    assert done.returncode == 0, done.stderr
    [row] = rows(tmp_path)
    assert 0 < row["router/replay_differing"] < 0.5
