"""Judges responses in worker processes that can be killed, and remembers what it has judged.

pebble.ProcessPool (5.x) runs the jobs. Workers come from a fork server, never from a fork of the parent, whose gloo and
NCCL threads a fork would copy in mid-air. The server imports the scorers once, so a killed worker is replaced in well
under a second.

A job's limit is processor time. The kernel ends its worker (SIGPROF), whatever expression the interpreter is lost in,
and other work on the machine does not count. By the clock a job has three times that plus 2 s, for jobs that only wait.
A job that runs out of clock time, or loses its worker, may have been disturbed by others. It is tried once more, by
itself, in a second pool of one worker. So are the jobs that a killed worker had before it, because pebble counts their
time from when it hears of them, which may be after the kill. A broken pool (pebble declares one when a worker dies
idle) is replaced, and its jobs are sent once more. If a scheduler asks the run to stop, it signals every process, and
the run still finishes the step that it is in.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import resource
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import pebble

from megatron_rl.compat.pebble_exits import notice_every_exit
from megatron_rl.config.reward import RewardConfig
from megatron_rl.foreign import told
from megatron_rl.reward.base import Job, Judgement
from megatron_rl.reward.llm import JudgeScorer
from megatron_rl.reward.route import Routes
from megatron_rl.reward.user import UserScorer
from megatron_rl.signals import stop_unheard
from megatron_rl.types import Prompt, Score

__all__ = ["RewardPool"]

MEMO_ENTRIES = 65536
TRIAL_RESPONSE = "The answer is 0."
BROKEN_POOLS = 3  # in a row, for one job
CLOCK_FACTOR, CLOCK_SLACK_S = 3, 2.0
WORKER_MEMORY_BYTES = 4 * 1024**3
WORKERS_DIE = ("the reward workers die before they take work; the worker's own message is above. A script that makes a "
               "RewardPool needs `if __name__ == \"__main__\":` around its main part")

_LOG = logging.getLogger(__name__)


ALONE = 0  # workers beside others: none


@dataclass(frozen=True)
class _Attempt:
    """A job on its way. workers: of the pool that runs it, ALONE for the second attempt."""

    job: Job
    slot: Hashable
    outcome: Future[Score]
    workers: int
    broken_pools: int = 0


class RewardPool:
    """Scores responses by reward.routes, on reward.workers processes.

    Each job has reward.timeout_s processor seconds, or its own limit. A job over its time scores (0, timeout), or the
    status that the job names. A scorer that raises, or takes its worker down twice, scores (0, error, why). Neither is
    remembered. Every other score of a job with a memo key is, and equal jobs in flight share one run.
    Workers start with the first job (or warm_up) and end with close. Safe from several threads.
    """

    def __init__(self, config: RewardConfig):
        self.jobs_sent = 0
        self._judged = (0, 0)
        self._config = config
        self._routes = Routes(config.routes, config)
        self._asks_model = any(isinstance(scorer, JudgeScorer) for scorer in self._routes.scorers())
        self._lock = threading.RLock()
        self._pools: dict[int, pebble.ProcessPool] = {}
        """By the workers that attempts ask for: reward.workers, or ALONE."""
        self._retiring: list[threading.Thread] = []
        self._started = False
        self._closed = False
        self._memo: OrderedDict[Hashable, Score] = OrderedDict()
        self._in_flight: dict[Hashable, Future[Score]] = {}
        self._failures_told: set[str] = set()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_domains(self, domains: Iterable[str]) -> None:
        """ValueError naming reward.routes.<domain> for each domain without a scorer."""
        self._routes.check_domains(domains)

    def check(self, prompt: Prompt) -> None:
        """ValueError if the scorer of the prompt's domain lacks something that it needs of the prompt."""
        self._routes.scorer(prompt.domain).check(prompt)

    def try_out(self, prompt: Prompt) -> None:
        """ValueError if a user's own function or a model judges the prompt's domain and fails for two plain responses.

        Otherwise a function that fails for every response would only show after the engines have started.
        """
        if not isinstance(self._routes.scorer(prompt.domain), UserScorer | JudgeScorer):
            return
        scores = self.score_many([(prompt, prompt.answer), (prompt, TRIAL_RESPONSE)])
        if all(score.failed for score in scores):
            raise ValueError(f"reward.routes.{prompt.domain}={self._config.routes[prompt.domain]} cannot judge a "
                             f"response to problem {prompt.id}, neither its reference answer nor {TRIAL_RESPONSE!r}: "
                             f"{scores[-1].detail}")

    def warm_up(self) -> None:
        """Starts the workers and waits until one is ready (seconds: imports). No-op if no route needs one."""
        if self._started or all(scorer.warm_up is None for scorer in self._routes.scorers()):
            return
        with self._lock:
            ready = self._running_pool(self._config.workers).schedule(_ready)
        try:
            ready.result()
        except BrokenProcessPool as error:
            raise RuntimeError(WORKERS_DIE) from error
        self._started = True

    async def score(self, prompt: Prompt, response_text: str) -> Score:
        """Judges one response without blocking the event loop. ValueError if the domain has no route."""
        prepared = self._routes.scorer(prompt.domain).prepare(prompt, response_text)
        if isinstance(prepared, Score):
            return prepared
        if not self._started:
            await asyncio.to_thread(self.warm_up)
        return await _outcome(self._submit(prepared))

    def score_many(self, items: list[tuple[Prompt, str]]) -> list[Score]:
        """Judges all items, in order, and waits. Not for use inside an event loop: it blocks."""
        prepared = [self._routes.scorer(prompt.domain).prepare(prompt, text) for prompt, text in items]
        waiting = [self._submit(part) if isinstance(part, Job) else part for part in prepared]
        return [part if isinstance(part, Score) else part.result() for part in waiting]

    def take_metrics(self) -> dict[str, float]:
        """What a judge that is a model has cost since the last call (docs/metrics.md)."""
        with self._lock:
            (requests, tokens), self._judged = self._judged, (0, 0)
        return {"reward/judge_requests": requests, "reward/judge_tokens": tokens} if self._asks_model else {}

    def close(self) -> None:
        """Ends the workers at once; scores still awaited are cancelled. The pool cannot be used again."""
        with self._lock:
            self._closed = True
            pools, unfinished = list(self._pools.values()), list(self._in_flight.values())
            self._pools.clear()
            self._in_flight.clear()
        for outcome in unfinished:
            outcome.cancel()
        for pool in pools:
            pool.stop()
            pool.join()
        for thread in self._retiring:
            thread.join()

    def _submit(self, job: Job) -> Future[Score]:
        """A future of the job's score: remembered, shared with an equal job in flight, or sent to a worker."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the RewardPool is closed")
            if job.memo_key in self._memo:
                self._memo.move_to_end(job.memo_key)
                known: Future[Score] = Future()
                known.set_result(self._memo[job.memo_key])
                return known
            if job.memo_key in self._in_flight:
                return self._in_flight[job.memo_key]
            slot = object() if job.memo_key is None else job.memo_key
            attempt = _Attempt(job, slot, Future(), self._config.workers)
            self._in_flight[slot] = attempt.outcome
            self.jobs_sent += 1
            self._send(attempt)
        return attempt.outcome

    def _send(self, attempt: _Attempt) -> None:
        """Needs the lock."""
        limit_s = attempt.job.timeout_s or self._config.timeout_s
        running = self._running_pool(attempt.workers).schedule(
            _run_limited, args=(attempt.job, limit_s), timeout=CLOCK_FACTOR * limit_s + CLOCK_SLACK_S)
        running.add_done_callback(lambda done: self._settle(attempt, done))

    def _settle(self, attempt: _Attempt, done: Future[Score]) -> None:
        """Turns a finished job into its outcome, or tries it once more; runs on one of pebble's threads."""
        with self._lock:
            if attempt.slot not in self._in_flight or attempt.outcome.done():
                return  # closed in the meantime
            error = done.exception()
            if isinstance(error, BrokenProcessPool) and attempt.broken_pools < BROKEN_POOLS:
                return self._send(replace(attempt, broken_pools=attempt.broken_pools + 1))
            if _may_be_chance(error) and attempt.workers != ALONE:
                return self._send(replace(attempt, workers=ALONE))
            del self._in_flight[attempt.slot]
            if isinstance(error, BrokenProcessPool):
                return attempt.outcome.set_exception(RuntimeError(WORKERS_DIE))
            score = done.result() if error is None else self._failure(attempt.job, error)
            if isinstance(score, Judgement):
                self._judged = (self._judged[0] + score.requests, self._judged[1] + score.tokens)
                score = Score(score.value, score.status, score.detail, score.correct)
            if score.status == "error":
                self._tell(attempt.job, score)
            elif score.status != "timeout" and attempt.job.memo_key is not None:
                self._memo[attempt.job.memo_key] = score
                if len(self._memo) > MEMO_ENTRIES:
                    self._memo.popitem(last=False)
            attempt.outcome.set_result(score)

    def _failure(self, job: Job, error: BaseException) -> Score:
        if isinstance(error, TimeoutError) or _out_of_time(error):
            limit = f"{job.timeout_s} s" if job.timeout_s else f"reward.timeout_s={self._config.timeout_s}"
            return Score(0.0, job.overdue, f"not judged within {limit}")
        if isinstance(error, pebble.ProcessExpired):
            return Score(0.0, "error", f"the scorer took its worker down (exit code {error.exitcode})")
        return Score(0.0, "error", told(error))

    def _tell(self, job: Job, score: Score) -> None:
        """Warns once per function and kind of failure, because a reward function that always fails looks like a bad
        policy.
        """
        kind = f"{job.function.__module__}.{job.function.__qualname__}: {score.detail.partition(':')[0]}"
        if kind not in self._failures_told:
            self._failures_told.add(kind)
            _LOG.warning("a response could not be judged by %s: %s (further ones of this kind are only counted)",
                         job.function.__qualname__, score.detail)

    def _running_pool(self, workers: int) -> pebble.ProcessPool:
        """The pool of so many workers; a broken one (an idle worker was killed) is replaced. Needs the lock."""
        pool = self._pools.get(workers)
        if pool is not None and not pool.active:
            # not joined here: the pool's threads may be waiting for the lock in _settle
            retiring = threading.Thread(target=pool.join, daemon=True)
            retiring.start()
            self._retiring.append(retiring)
            pool = None
        if pool is None:
            pool = self._pools[workers] = self._new_pool(workers)
        return pool

    def _new_pool(self, workers: int) -> pebble.ProcessPool:
        scorers = self._routes.scorers()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_preload(module for scorer in scorers for module in scorer.preload))
        if multiprocessing.current_process().name == "MainProcess":  # in a worker, an unguarded script: WORKERS_DIE
            for process in (multiprocessing.resource_tracker, multiprocessing.forkserver):
                with stop_unheard():  # for each anew: the tracker's start unblocks SIGTERM
                    process.ensure_running()
        warm_ups = tuple(dict.fromkeys(scorer.warm_up for scorer in scorers if scorer.warm_up is not None))
        return notice_every_exit(pebble.ProcessPool(max_workers=max(1, workers), initializer=_initialise_worker,
                                                    initargs=(warm_ups,), context=context))


async def _outcome(future: Future[Score]) -> Score:
    """Shielded, because the future may be shared: one caller's cancellation must not cancel it."""
    return await asyncio.shield(asyncio.wrap_future(future))


def _out_of_time(error: BaseException | None) -> bool:
    return isinstance(error, pebble.ProcessExpired) and error.exitcode == -signal.SIGPROF


def _may_be_chance(error: BaseException | None) -> bool:
    """Whether others may have caused the way in which a job ended: no processor, no memory, a signal."""
    return isinstance(error, (TimeoutError, pebble.ProcessExpired)) and not _out_of_time(error)


def _run_limited(job: Job, limit_s: float) -> Score:
    """Runs in a worker. The kernel ends the worker once the job has used its processor time."""
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        return job.run()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def _preload(modules: Iterable[str]) -> list[str]:
    """What the fork server imports once: the scorers, and the main module if it was started with -m.

    Each worker runs the main module's top level again (multiprocessing/spawn.py `prepare`), and in 3.12.1 the server
    does not load it beforehand (CPython gh-126631). With its imports in memory that costs nothing.
    """
    spec = sys.modules["__main__"].__spec__
    main = [spec.name] if spec is not None and not spec.name.endswith("__main__") else []
    return [__name__, *dict.fromkeys(modules), *main]


def _initialise_worker(warm_ups: tuple[Callable[[], None], ...]) -> None:
    """SIGTERM kills at once (pebble's handler waits for the interpreter, which a huge integer power holds)."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGPROF])
    # the fork server does not hear it, a worker has to
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = WORKER_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(WORKER_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    _end_with_owner()
    for warm_up in warm_ups:
        warm_up()


def _end_with_owner() -> None:
    """The kernel ends this worker, whatever it computes, when the process that made the pool has been killed.

    The worker's parent is the fork server, which outlives its maker for as long as a worker lives. The sentinel is a
    pipe, whose other end the maker alone holds; SIGIO tells that it was closed.
    """
    sentinel = multiprocessing.parent_process().sentinel
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO])
    fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    if multiprocessing.connection.wait([sentinel], 0):  # it was closed before
        os.kill(os.getpid(), signal.SIGIO)


def _ready() -> None:
    return None
