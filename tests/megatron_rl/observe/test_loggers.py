"""TensorBoard, MLflow and SwanLab get every number once, across a resume; none of them can end a run.

Each is tested with its own client, read back by its own reader; without the client the test says which extra it needs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from megatron_rl.config.schema import ObserveConfig
from megatron_rl.observe import MetricsLog, sinks
from megatron_rl.observe.feed import KNOWN
from megatron_rl.observe.jsonl import read_jsonl
from megatron_rl.observe.sinks import check_logger
from megatron_rl.rollout.ports import choose_port

PROJECT = "project-of-test"
CONFIG = {"run": {"steps": 3}, "algo": {"phi": 64}, "observe": {"project": PROJECT},
          "reward": {"routes": {"a@b": "exact"}}}
LOGGED = {"reward/mean": {1: 0.5, 2: 0.75, 3: 0.25}, "eval/pass@4": {1: 0.125, 2: 0.25, 3: 0.5}}


def needs(module: str) -> None:
    if importlib.util.find_spec(module.split(".")[0]) is None or importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: an extra of setup.py that make setup leaves out")


def log_a_resumed_run(folder: Path, name: str) -> None:
    """Steps 1 to 3. The first start also wrote another step 3, which the resume from step 2 takes back."""
    options = ObserveConfig(wandb="off", project=PROJECT, loggers=(name,))
    for steps, resume in (((1, 2, 3), None), ((3,), 2)):
        with MetricsLog(folder, options, CONFIG, resume_step=resume) as log:
            for step in steps:
                undone = step == 3 and resume is None
                log.log(step, {"reward/mean": 9.0 if undone else LOGGED["reward/mean"][step]})
                log.log_eval(step, "during", {"pass@4": 9.0 if undone else LOGGED["eval/pass@4"][step], "text": "x"})


def test_tensorboard_reads_the_numbers_back_without_the_steps_that_a_resume_took_back(tmp_path, messages):
    needs("tensorboard")
    log_a_resumed_run(tmp_path / "run", "tensorboard")
    assert messages() == [], (tmp_path / "run" / "loggers" / "tensorboard" / "feed.log").read_text()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert sorted(found.Tags()["scalars"]) == sorted(LOGGED)
    for name, values in LOGGED.items():
        assert {event.step: event.value for event in found.Scalars(name)} == values
        assert len(found.Scalars(name)) == 3


def check_mlflow(folder: Path, uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(PROJECT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (folder.name, "FINISHED")
    assert (run.data.params["algo.phi"], run.data.params["reward.routes.a_b"]) == ("64", "exact")
    for name, values in LOGGED.items():
        history = client.get_metric_history(run.info.run_id, name.replace("@", "_"))
        assert {point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)} == values


def test_mlflow_holds_one_run_that_a_resume_goes_on(tmp_path, monkeypatch, messages):
    """On a real server, where mlflow's server is installed too; in a folder with the client alone."""
    needs("mlflow")
    has_server = importlib.util.find_spec("flask") and importlib.util.find_spec("sqlalchemy")
    if not has_server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := (tmp_path / "store").as_uri())
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        log_a_resumed_run(tmp_path / "run", "mlflow")
        check_mlflow(tmp_path / "run", uri)
        return
    port = choose_port(None)
    uri = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--artifacts-destination",
         str(tmp_path / "artifacts")], cwd=tmp_path, stdout=(tmp_path / "server.log").open("w"),
        stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for(uri + "/health", server)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        log_a_resumed_run(tmp_path / "run", "mlflow")
        assert messages() == [], (tmp_path / "run" / "loggers" / "mlflow" / "feed.log").read_text()
        check_mlflow(tmp_path / "run", uri)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(url: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server did not answer at {url}")


def test_swanlab_writes_its_files_inside_the_run_directory(tmp_path, monkeypatch, messages):
    needs("swanlab")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    log_a_resumed_run(tmp_path / "run", "swanlab")
    assert messages() == [], (tmp_path / "run" / "loggers" / "swanlab" / "feed.log").read_text()
    written = b"".join(path.read_bytes() for path in (tmp_path / "run" / "swanlab").rglob("*") if path.is_file())
    for name in LOGGED:
        assert name.encode() in written
    assert PROJECT.encode() in written


@pytest.mark.parametrize("name", KNOWN)
def test_a_logger_that_cannot_be_made_costs_a_warning(name, tmp_path, monkeypatch, messages):
    """Its client is not there, or a module of that name raises: the run goes on, and metrics.jsonl has everything."""
    (tmp_path / "broken" / name).mkdir(parents=True)
    (tmp_path / "broken" / name / "__init__.py").write_text("raise OSError('no route')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    monkeypatch.syspath_prepend(tmp_path / "broken")
    log_a_resumed_run(tmp_path / "run", name)
    assert len(messages()) == 2 and all(f"{name} did not get everything" in text for text in messages())
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert "no route" in (tmp_path / "run" / "loggers" / name / "feed.log").read_text()


def test_a_logger_that_is_killed_costs_a_warning(tmp_path, messages):
    needs("tensorboard")
    options = ObserveConfig(wandb="off", project=PROJECT, loggers=("tensorboard",))
    with MetricsLog(tmp_path / "run", options, CONFIG) as log:
        log.log(1, {"reward/mean": 0.5})
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):  # one of an earlier test that has ended
                if "feed.py" in " ".join(child.cmdline()):
                    child.kill()
        log.log(2, {"reward/mean": 0.75})
    (warning,) = messages()
    assert "tensorboard did not get everything" in warning
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("name", KNOWN)
def test_a_missing_client_is_refused_before_the_start_with_the_extra_that_brings_it(name, monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=rf"observe.loggers={name} needs the package {name}: pip install "
                                         rf"'megatron_rl\[{name}\]'"):
        check_logger(name)


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_logger_is_an_extra_and_its_client_is_not_imported_by_the_run(name):
    text = (Path(__file__).parents[3] / "setup.py").read_text()
    assert f'"{name}": ["{name}' in text
    done = subprocess.run([sys.executable, "-c", "import sys; import megatron_rl.observe.sinks; "
                           f"print({name!r} in sys.modules)"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
