"""RewardPool with real worker processes: time limits, crashes, sharing, remembering, closing."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest

from megatron_rl.config.schema import RewardConfig
from megatron_rl.reward import RewardPool
from megatron_rl.reward import pool as pool_module
from megatron_rl.types import Prompt, Score

USER_MODULE = "pool_rewards_of_test"
BOMB = "\\boxed{9^{9^{9^{9}}}}"


def prompt(answer, domain="math"):
    return Prompt("p", (1,), "question", answer, domain)


def worker_pids():
    return {process.pid for process in multiprocessing.active_children() if process.name == "pebble_pool_worker"}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / f"{USER_MODULE}.py").write_text(textwrap.dedent("""
        import os, time
        class Unpicklable(Exception):
            def __init__(self, one, two): super().__init__("two arguments")
        def score(prompt, response_text):
            if response_text == "die": os._exit(7)
            if response_text == "hang": time.sleep(60)
            if response_text == "hoard": return len(bytearray(6 << 30))
            if response_text == "raise": raise Unpicklable(1, 2)
            if response_text == "pid": return os.getpid()
            return 1
    """))
    sys.path.insert(0, str(folder))
    config = RewardConfig(routes={"math": "math_verify", "arithmetic": "exact", "user": f"{USER_MODULE}.score"},
                          workers=2, timeout_s=2.0)
    with RewardPool(config) as pool:
        yield pool
    sys.path.remove(str(folder))


def judged(pool, items, statuses):
    """The scores, which have these statuses. A pause of this machine may cost an honest item its two seconds, and it is
    judged again then, in the same company; what is disturbed by its company is so each time."""
    for _ in range(4):
        scores = pool.score_many(items)
        if [score.status for score in scores] == statuses:
            return scores
    raise AssertionError([score.status for score in scores])


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_exact_and_boxless_answers_start_no_worker():
    others = worker_pids()
    with RewardPool(RewardConfig(routes={"math": "math_verify", "arithmetic": "exact"})) as pool:
        scores = pool.score_many([(prompt("7", "arithmetic"), " 7"), (prompt("7"), "seven"),
                                  (prompt("7"), "\\boxed{7}")])
        assert [score.status for score in scores] == ["correct", "no_answer", "correct"]
        assert pool.jobs_sent == 0 and worker_pids() <= others


def test_a_bomb_costs_its_own_slot_only(pool):
    pool.warm_up()
    items = [(prompt(f"\\frac{{{i}}}{{7}}"), f"\\boxed{{{i + i % 2}/7}}") for i in range(1, 61)]
    items.insert(30, (prompt("5"), BOMB))
    statuses = ["wrong" if i % 2 else "correct" for i in range(1, 61)]
    bomb = judged(pool, items, [*statuses[:30], "timeout", *statuses[30:]])[30]
    assert "reward.timeout_s=2.0" in bomb.detail


def test_statuses_are_told_apart_within_one_batch(pool):
    items = [(prompt("1", "user"), text) for text in ("fine", "hang", "die", "raise", "hoard")]
    items += [(prompt("x+1"), "\\boxed{1+x}"), (prompt("x+1"), "\\boxed{x}"), (prompt("x"), "x")]
    scores = judged(pool, items, [
        "correct", "timeout", "error", "error", "error", "correct", "wrong", "no_answer"])
    assert [score.value for score in scores] == [1, 0, 0, 0, 0, 1, 0, 0]
    assert "exit code 7" in scores[2].detail
    assert scores[3].detail == "Unpicklable: two arguments" and "MemoryError" in scores[4].detail


def test_a_judged_pair_is_not_sent_twice(pool):
    pair = (prompt("a+b"), "first \\boxed{b+a}")
    judged(pool, [pair], ["correct"])
    sent = pool.jobs_sent
    assert pool.score_many([(prompt("a+b"), "other words, same box \\boxed{b+a}")] * 8)[0].status == "correct"
    assert pool.jobs_sent == sent
    judged(pool, [(prompt("a-b"), pair[1])], ["wrong"])
    assert pool.jobs_sent > sent, "the memo key must hold the answer"


def test_equal_pairs_in_flight_share_one_run_and_a_timeout_is_not_remembered(pool):
    sent = pool.jobs_sent
    bombs = [(prompt("6"), BOMB)] * 4
    assert [score.status for score in pool.score_many(bombs)] == ["timeout"] * 4
    assert pool.jobs_sent == sent + 1
    assert pool.score_many(bombs[:1])[0].status == "timeout"
    assert pool.jobs_sent == sent + 2


@pytest.fixture
def attempts(tmp_path, monkeypatch):
    """A pool whose scorer does what the response says, and a list of the attempts that it made."""
    (tmp_path / "attempts_of_test.py").write_text(textwrap.dedent(f"""
        import os, pathlib, signal, time
        log = pathlib.Path({str(tmp_path / 'log')!r})
        def score(prompt, response_text):
            with log.open("a") as file: file.write(response_text + "\\n")
            first = log.read_text().split("\\n").count(response_text) == 1
            if response_text == "wait": time.sleep(1.2)
            if response_text == "hang once" and first: time.sleep(60)
            if response_text == "hang": time.sleep(60)
            if response_text == "killed once" and first: os.kill(os.getpid(), signal.SIGKILL)
            if response_text == "killed": os.kill(os.getpid(), signal.SIGKILL)
            if response_text == "burn":
                while True: pass
            return 1
    """))
    monkeypatch.syspath_prepend(tmp_path)
    with RewardPool(RewardConfig(routes={"user": "attempts_of_test.score"}, workers=1, timeout_s=0.4)) as pool:
        pool.warm_up()
        yield pool, lambda: sorted((tmp_path / "log").read_text().split("\n")[:-1])


def test_the_limit_is_processor_time_and_chance_gets_a_second_attempt_by_itself(attempts):
    pool, made = attempts
    texts = ["wait", "hang once", "killed once", "burn", "hang", "killed", "fine"]
    scores = dict(zip(texts, pool.score_many([(prompt("1", "user"), text) for text in texts]), strict=True))
    assert {text: score.status for text, score in scores.items()} == {
        "wait": "correct",  # 1.2 s by the clock, nearly nothing of the processor
        "hang once": "correct", "killed once": "correct", "burn": "timeout", "hang": "timeout", "killed": "error",
        "fine": "correct"}
    assert made() == sorted(["wait", "hang once", "hang once", "killed once", "killed once", "burn", "hang", "hang",
                             "killed", "killed", "fine"])
    assert "exit code -9" in scores["killed"].detail and "reward.timeout_s=0.4" in scores["burn"].detail


def test_what_waits_behind_a_killed_worker_is_judged(attempts):
    pool, made = attempts
    items = [(prompt("1", "user"), "killed once"), *[(prompt("1", "user"), f"fine {i}") for i in range(20)]]
    assert [score.status for score in pool.score_many(items)] == ["correct"] * 21
    assert len(made()) >= 22


def test_user_rewards_are_run_each_time(pool):
    sent = pool.jobs_sent
    pool.score_many([(prompt("1", "user"), "fine")] * 3)
    assert pool.jobs_sent == sent + 3


def test_the_memo_forgets_the_least_recently_used_pair_first(monkeypatch):
    monkeypatch.setattr(pool_module, "MEMO_ENTRIES", 2)
    first, second, third = [(prompt("a+b"), f"\\boxed{{b+a{zeros}}}") for zeros in ("", "+0", "+0+0")]
    with RewardPool(RewardConfig(workers=1, timeout_s=60.0)) as pool:
        sent = []
        for pair in (first, second, first, third, first, second):
            judged(pool, [pair], ["correct"])
            sent.append(pool.jobs_sent)
    # first and second are judged, first is remembered, third pushes second out, first stays, second is judged anew
    assert sent == [1, 2, 2, 3, 3, 4]


def test_awaited_scores_leave_the_event_loop_free(pool):
    async def judge():
        ticks = 0
        waiting = asyncio.gather(*(pool.score(prompt("1", "user"), text) for text in ("hang", "fine", "fine")))
        while not waiting.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return await waiting, ticks

    scores, ticks = asyncio.run(judge())
    assert scores[0].status == "timeout"
    assert ticks > 5  # of about 200 in the two seconds that the hanging one takes


def test_cancelling_one_caller_leaves_the_others_their_score(pool):
    async def judge(attempt):
        pair = prompt("d+e"), "\\boxed{e+d+" + "0+" * attempt + "0}"
        first, second = (asyncio.create_task(pool.score(*pair)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert any(asyncio.run(judge(attempt)).status == "correct" for attempt in range(4))  # unless this machine pauses


def test_workers_come_from_the_fork_server_and_not_from_this_process(pool):
    worker = int(judged(pool, [(prompt("1", "user"), "pid")], ["correct"])[0].value)
    parent = int(open(f"/proc/{worker}/stat").read().rsplit(")", 1)[1].split()[1])
    assert parent != os.getpid()


def test_a_pool_whose_idle_workers_are_killed_goes_on(pool):
    pool.warm_up()
    for pid in worker_pids():
        with suppress(ProcessLookupError):  # one of an earlier pool may just have ended
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not pool._pools[2].active)  # pebble looks every 0.1 s and then declares the pool broken
    judged(pool, [(prompt("1", "user"), "fine")], ["correct"])


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_scheduler_that_signals_every_process_costs_no_score(tmp_path, monkeypatch, number):
    (tmp_path / "held_rewards_of_test.py").write_text(textwrap.dedent("""
        import pathlib, time
        def score(prompt, response_text):
            folder = pathlib.Path(response_text)
            folder.joinpath(prompt.answer).touch()
            while not folder.joinpath("go").exists(): time.sleep(0.01)
            return 1
    """))
    monkeypatch.syspath_prepend(tmp_path)
    with RewardPool(RewardConfig(routes={"user": "held_rewards_of_test.score"}, workers=2, timeout_s=250.0)) as pool:
        with ThreadPoolExecutor() as thread:
            scores = thread.submit(pool.score_many, [(prompt(answer, "user"), str(tmp_path)) for answer in "ab"])
            wait_until(lambda: all((tmp_path / answer).exists() for answer in "ab"))
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # a worker of an earlier pool may just have ended
                    process.send_signal(number)
            time.sleep(0.3)  # for those that would die
            (tmp_path / "go").touch()
        assert [score.status for score in scores.result()] == ["correct", "correct"]
        assert [score.value for score in scores.result()] == [1.0, 1.0]


def test_a_domain_without_a_route_is_named(pool):
    with pytest.raises(ValueError, match=r"reward\.routes\.code"):
        pool.score_many([(prompt("1", "code"), "x")])
    with pytest.raises(ValueError, match=r"reward\.routes\.code"):
        asyncio.run(pool.score(prompt("1", "code"), "x"))
    with pytest.raises(ValueError, match=r"reward\.routes\.code"):
        pool.check_domains({"math", "code"})


def test_close_ends_workers_and_cancels_what_is_awaited():
    pool = RewardPool(RewardConfig(workers=1, timeout_s=250.0))
    pool.warm_up()

    async def judge_and_close():
        waiting = asyncio.create_task(pool.score(prompt("5"), BOMB))
        while pool.jobs_sent == 0:
            await asyncio.sleep(0.01)
        own = {*pool._pools[1]._pool_manager.worker_manager.workers}
        start = time.monotonic()
        await asyncio.to_thread(pool.close)
        took = time.monotonic() - start
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return own, took

    own, took = asyncio.run(judge_and_close())
    assert len(own) == 1 and not own & worker_pids() and took < 60  # the bomb takes 250
    with pytest.raises(RuntimeError, match="closed"):
        pool.score_many([(prompt("x"), "\\boxed{1x}")])


def test_nothing_is_left_when_the_trainer_is_killed_while_a_judge_is_lost_in_an_expression(tmp_path):
    (tmp_path / "lost_rewards_of_test.py").write_text(textwrap.dedent("""
        import pathlib
        def score(prompt, response_text):
            pathlib.Path("judging").touch()
            return 3 ** 10 ** 10
    """))
    script = tmp_path / "trainer.py"
    script.write_text(textwrap.dedent("""
        import os, pathlib, signal, threading, time
        from megatron_rl.config.schema import RewardConfig
        from megatron_rl.reward import RewardPool
        from megatron_rl.types import Prompt
        if __name__ == "__main__":
            pool = RewardPool(RewardConfig(routes={"user": "lost_rewards_of_test.score"}, timeout_s=250.0))
            items = [(Prompt("p", (), "", "", "user"), "text")]
            threading.Thread(target=pool.score_many, args=[items], daemon=True).start()
            while not pathlib.Path("judging").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
    """))
    paths = [str(tmp_path), *(path or os.getcwd() for path in sys.path)]
    env, marker = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, {"REWARD_POOL_OF_TEST": str(os.getpid())}
    subprocess.run([sys.executable, str(script)], env={**env, **marker}, stderr=subprocess.DEVNULL, check=False,
                   cwd=tmp_path)
    assert (tmp_path / "judging").exists()
    wait_until(lambda: not processes_with(marker))


def processes_with(marker):
    [(name, value)] = marker.items()
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if f"{name}={value}".encode() in file.read():
                    found.append(pid)
        except OSError:
            continue  # it ended, or it is not ours
    return found


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(textwrap.dedent("""
        from megatron_rl.config.schema import RewardConfig
        from megatron_rl.reward import RewardPool
        RewardPool(RewardConfig()).warm_up()
    """))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    result = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=600,
                            check=False)
    assert result.returncode != 0 and '__name__ == "__main__"' in result.stderr


def test_scores_match_the_scorers_run_here(pool):
    items = [(prompt("\\frac{1}{2}"), "\\boxed{0.5}"), (prompt("7", "arithmetic"), "8"), (prompt("1", "user"), "fine")]
    expected = [Score(1.0, "correct"), Score(0.0, "wrong"), Score(1.0, "correct")]
    assert judged(pool, items, [score.status for score in expected]) == expected
