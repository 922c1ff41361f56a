"""No cheat is rewarded; the honest solution of the same task is."""

import functools
from collections import Counter

import pytest

from megatron_rl.config.schema import RewardConfig
from megatron_rl.reward.code import CodeScorer
from megatron_rl.types import Prompt, Score
from tests.megatron_rl.reward.cheats import CHEATS, REFUSED, Cheat, Task
from tests.sandboxes import needs_language, needs_sandbox


@functools.cache
def scorer() -> CodeScorer:
    return CodeScorer(RewardConfig())


def judged(task: Task, source: str) -> Score:
    prompt = Prompt("p", (1,), "question", "", "code", task.metadata)
    return scorer().score(prompt, f"```{task.language}\n{source}\n```")


HONEST: dict[tuple[str, str, str, str], Score] = {}


def honest(task: Task) -> Score:
    key = task.language, task.mode, str(task.tests), task.honest
    if key not in HONEST:
        HONEST[key] = judged(task, task.honest)
    return HONEST[key]


def test_there_are_cheats_in_every_language_and_mode():
    assert len({(str(cheat.task), cheat.source) for cheat in CHEATS}) == len(CHEATS) >= 60
    counts = Counter((cheat.task.language, cheat.task.mode) for cheat in CHEATS)
    assert set(counts) == {("python", "unit"), *((language, mode) for language in ("python", "cpp", "java")
                                                 for mode in ("stdin", "function"))}
    assert min(counts.values()) >= 2


@pytest.mark.slow
@needs_sandbox
@pytest.mark.parametrize("cheat", [
    pytest.param(cheat, marks=needs_language(cheat.task.language),
                 id=f"{cheat.task.language}-{cheat.task.mode}-{cheat.name}".replace(" ", "_")) for cheat in CHEATS])
def test_a_cheat_scores_0_and_the_honest_solution_beside_it_1(cheat: Cheat):
    score = judged(cheat.task, cheat.source)
    assert score.value == 0.0 and score.status not in ("error", "correct"), score
    assert honest(cheat.task) == Score(1.0, "correct")


@pytest.mark.parametrize(("sandbox", "metadata"), REFUSED)
def test_what_cannot_be_made_safe_is_refused_by_name(sandbox, metadata, monkeypatch):
    monkeypatch.setattr("megatron_rl.reward.remote.Remote.check", lambda self: None)
    from megatron_rl.config.reward import RemoteConfig
    refusing = CodeScorer(RewardConfig(sandbox=sandbox, remote=RemoteConfig(url="http://127.0.0.1:9")))
    prompt = Prompt("row-7", (1,), "question", "", "code", metadata)
    with pytest.raises(ValueError, match=r"prompt row-7: .*(unit|function).*forge"):
        refusing.check(prompt)
    with pytest.raises(ValueError, match="prompt row-7"):
        refusing.prepare(prompt, "```\nx\n```")
