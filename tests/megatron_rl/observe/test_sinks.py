"""metrics.jsonl and eval.jsonl hold every step once, across crashes and resumes; wandb gets the same numbers."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_rl.config.schema import ObserveConfig
from megatron_rl.observe import sinks
from megatron_rl.observe.jsonl import read_jsonl
from megatron_rl.observe.sinks import MetricsLog, check_logger

REPOSITORY = Path(__file__).resolve().parents[3]
OFF = ObserveConfig(wandb="off")


def run_steps(directory, first, last, **options):
    with MetricsLog(directory, OFF, {"run": {"seed": 0}}, **options) as log:
        for step in range(first, last + 1):
            log.log(step, {"reward/mean": step / 10})
            log.log_eval(step, "during", {"accuracy": step / 10})


def test_each_line_is_on_disk_when_log_returns(tmp_path):
    log = MetricsLog(tmp_path, OFF, {})
    log.log(1, {"reward/mean": 0.5})
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert (row["step"], row["reward/mean"]) == (1, 0.5) and row["time"] > 0
    log.close()


def test_resume_leaves_no_step_twice(tmp_path):
    run_steps(tmp_path, 1, 7)
    run_steps(tmp_path, 5, 9, resume_step=4)
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert [row["step"] for row in read_jsonl(tmp_path / name)] == list(range(1, 10))


def test_a_line_torn_by_a_crash_is_dropped_on_resume(tmp_path):
    run_steps(tmp_path, 1, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    run_steps(tmp_path, 4, 5, resume_step=3)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path):
    run_steps(tmp_path, 1, 3)
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds the metrics of an earlier run.*run\.resume=true"):
        MetricsLog(tmp_path, OFF, {})
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        MetricsLog(tmp_path, OFF, {}, resume_step=3)


def test_config_and_versions_are_written(tmp_path):
    run_steps(tmp_path, 1, 1)
    assert json.loads((tmp_path / "config.json").read_text()) == {"run": {"seed": 0}}
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions["packages"]["torch"].startswith("2.") and versions["machine"]["cores"] >= 1


def test_other_settings_of_a_resumed_run_stand_beside_the_old_ones(tmp_path):
    """Whatever was true of the steps that stay; a start that left no step replaces none."""
    def start(settings, **options):
        with MetricsLog(tmp_path, OFF, settings, **options):
            pass

    first, second = {"algo": {"phi": 64}, "run": {"resume": False}}, {"algo": {"phi": 32}, "run": {"resume": True}}
    start(first)
    start({**first, "run": {"resume": True}}, resume_step=20)  # the same settings
    assert not list(tmp_path.glob("config_until*"))
    start(second, resume_step=40)
    start({"algo": {"phi": 16}}, resume_step=40)
    assert {path.name: json.loads(path.read_text())["algo"]["phi"] for path in tmp_path.glob("config*.json")} == {
        "config.json": 16, "config_until_step_00000040.json": 64}


def run_script(body, directory, mode, **environment):
    """Logs in a process of its own; returns what it printed. wandb's finish() may return before its service has
    written the offline file (wandb 0.31); the process does not exit before that."""
    script = ("import sys\nfrom megatron_rl.config.schema import ObserveConfig\n"
              "from megatron_rl.observe import MetricsLog\n"
              f"with MetricsLog(sys.argv[1], ObserveConfig(wandb={mode!r}), {{'algo': {{'phi': 64}}}}) as log:\n{body}")
    done = subprocess.run([sys.executable, "-c", script, str(directory)], capture_output=True, text=True, check=True,
                          timeout=600, cwd=REPOSITORY, env=os.environ | environment)
    return done.stdout.strip()


def test_wandb_is_not_imported_when_off(tmp_path):
    assert run_script("    log.log(1, {'a': 1.0})\nprint('wandb' in sys.modules)", tmp_path, "off") == "False"


def wandb_history(path):
    """Rows logged to an offline .wandb file: LevelDB log framing around protobuf records."""
    from wandb.proto import wandb_internal_pb2

    data, place, message, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place:place + 7])
        message += data[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record.FromString(message)
            message = b""
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json)
                             for item in record.history.item})
    return rows


@pytest.mark.slow
def test_offline_wandb_holds_the_same_numbers_inside_the_run_directory(tmp_path):
    run_script("    log.log(1, {'reward/mean': 0.25, 'train/loss': 1.5})\n"
               "    log.log(2, {'reward/mean': 0.5, 'train/loss': 1.0})\n", tmp_path / "run", "offline")
    files = [path for path in tmp_path.rglob("*.wandb") if "latest-run" not in path.parts]
    (path,) = files
    assert path.is_relative_to(tmp_path / "run" / "wandb")
    rows = wandb_history(path)
    assert [(row["step"], row["reward/mean"], row["train/loss"]) for row in rows] == [(1, 0.25, 1.5), (2, 0.5, 1.0)]


@pytest.mark.slow
def test_a_killed_run_with_wandb_leaves_nothing_outside_its_directory(tmp_path):
    """A run that is killed runs no clean-up, so what it made must lie in the run's own folder."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    run_script("    log.log(1, {'a': 1.0})\n    import os\n    os._exit(0)\n", tmp_path / "run", "offline",
               TMPDIR=str(temporary))
    assert (tmp_path / "run" / "wandb" / "feed.json").is_file()
    assert not list(temporary.iterdir())


WANDB_STRUCK = """
    import contextlib, os, psutil, signal, time
    from pathlib import Path
    while not list(Path(sys.argv[1]).glob("wandb/*run-*/*.wandb")):
        time.sleep(0.1)
    log.log(1, {{'a': 1.0}})
    struck = {{}}
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # wandb starts programs that end by themselves
            if {which}:
                struck[one] = one.name()
    assert 'wandb-core' in struck.values(), struck
    for one in struck:
        with contextlib.suppress(psutil.NoSuchProcess):  # the service ends when the process that started it is gone
            one.send_signal(signal.{blow})
    for step in range(2, 200):
        began = time.perf_counter()
        log.log(step, {{'a': 1.0, 'long': 'x' * 2000}})
        assert time.perf_counter() - began < 30
print('the end')
"""


def is_running_service(process: psutil.Process, folder: Path) -> bool:
    """Whether it is wandb's service of a run in `folder`. One that is dead and not yet reaped runs no more."""
    try:
        return process.name() == "wandb-core" and str(folder) in str(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("blow", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("which", ["'core' in one.name()", "True"], ids=["service", "everything"])
def test_whatever_becomes_of_wandb_the_run_goes_on_and_ends(which, blow, tmp_path):
    folder = tmp_path / ("a run of a long name, " * 5) / "l\u00e4uft"  # longer than the path of a socket may be
    body = WANDB_STRUCK.format(which=which, blow=blow)
    script = ("import sys\nfrom megatron_rl.config.schema import ObserveConfig\nfrom megatron_rl.observe import sinks\n"
              "sinks.LOGGER_CLOSE_S = 5.0\n"
              "with sinks.MetricsLog(sys.argv[1], ObserveConfig(wandb='offline'), {}) as log:" + body)
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=300,
                          cwd=REPOSITORY)
    assert done.returncode == 0 and done.stdout == "the end\n", done.stderr
    assert "wandb did not get everything" in done.stderr
    deadline = time.monotonic() + 60.0  # one that has been killed takes a moment to be gone on a busy machine
    while any(is_running_service(one, tmp_path) for one in psutil.process_iter()):
        assert time.monotonic() < deadline, "a service of wandb's was left"
        time.sleep(0.1)
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == list(range(1, 200))


LOGGERS = """
class Good:
    def __init__(self, run_dir, config): self._file = (run_dir / "told.txt").open("a"); self._phi = config["phi"]
    def log(self, step, numbers): self._file.write(f"{step} {sorted(numbers.items())} {self._phi}\\n")
    def close(self, finished): self._file.write(f"{finished}\\n"); self._file.close()
class NotMade(Good):
    def __init__(self, run_dir, config): raise KeyError("token")
class Raises(Good):
    def log(self, step, numbers): raise OSError("no route")
class NotClosed(Good):
    def close(self, finished): raise OSError("no route")
class Hangs(Good):
    def close(self, finished): import time; time.sleep(3600)
class NoClose:
    def log(self, step, numbers): pass
def function(run_dir, config): pass
"""


@pytest.fixture
def loggers(tmp_path, monkeypatch):
    (tmp_path / "loggers_of_test.py").write_text(LOGGERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "loggers_of_test", raising=False)
    return "loggers_of_test"


def test_a_logger_of_ones_own_is_told_each_number_once_across_a_resume(loggers, tmp_path):
    config = ObserveConfig(wandb="off", loggers=(f"{loggers}.Good",))
    for step, resume in ((1, None), (2, 1)):
        with MetricsLog(tmp_path / "run", config, {"phi": 64}, resume_step=resume) as log:
            log.log(step, {"reward/mean": step / 2})
            log.log_eval(step, "during", {"accuracy": 0.25, "text": "no number"})
    lines = [f"{step} [({name!r}, {value})] 64" for step in (1, 2)
             for name, value in (("reward/mean", step / 2), ("eval/accuracy", 0.25))]
    assert (tmp_path / "run" / "told.txt").read_text().splitlines() == [*lines[:2], "True", *lines[2:], "True"]


@pytest.mark.parametrize("fault", ["NotMade", "Raises", "NotClosed", "Hangs"])
def test_whatever_becomes_of_a_logger_the_run_goes_on_and_says_so(fault, loggers, tmp_path, monkeypatch, messages):
    close = sinks.LoggerFeed.close

    def close_soon(feed, exit_code):  # but Good has the time that a busy machine takes to start it
        monkeypatch.setattr(sinks, "LOGGER_CLOSE_S", 2.0 if feed._name.endswith("Hangs") else 60.0)
        close(feed, exit_code)

    monkeypatch.setattr(sinks.LoggerFeed, "close", close_soon)
    names = (f"{loggers}.{fault}", f"{loggers}.Good")
    with MetricsLog(tmp_path / "run", ObserveConfig(wandb="off", loggers=names), {"phi": 64}) as log:
        log.log(1, {"reward/mean": 0.5})
    (warning,) = messages()
    assert f"{loggers}.{fault} did not get everything" in warning
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1]
    assert "1 [('reward/mean', 0.5)] 64\nTrue\n" in (tmp_path / "run" / "told.txt").read_text()


def test_a_logger_that_cannot_be_started_does_not_end_the_run_either(loggers, tmp_path, messages):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "loggers").write_text("a file where its folder should be")
    with MetricsLog(tmp_path / "run", ObserveConfig(wandb="off", loggers=(f"{loggers}.Good",)), {"phi": 64}) as log:
        log.log(1, {"reward/mean": 0.5})
    (warning,) = messages()
    assert f"{loggers}.Good gets nothing: it could not be started" in warning
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("name", ["NoClose", "function"])
def test_what_is_no_logger_is_refused_before_the_start(name, loggers):
    check_logger(f"{loggers}.Good")
    with pytest.raises(ValueError, match=f"observe.loggers={loggers}.{name} is no logger: it must be a class with log"):
        check_logger(f"{loggers}.{name}")
