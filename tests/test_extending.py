"""docs/extending.md, followed to the letter: its code is a file's, its commands are accepted, its functions do what the
page says."""

import math
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from c3po import C3POLossConfig, StepTotals, policy_loss
from megatron_rl.batch import BudgetFill, assemble
from megatron_rl.cli import main
from megatron_rl.config.load import load
from megatron_rl.data.files import read_problems
from megatron_rl.recipes.quickstart import make_random_model
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score
from tests.megatron_rl.test_token_objective import TOTALS, evaluate, microbatch

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "examples" / "extending" / "my_hooks.py").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^PYTHONPATH=\S+ megatron-rl rl .*$", PAGE.replace("\\\n", " "), re.MULTILINE)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    for folder in ("extending", "quickstart"):
        monkeypatch.syspath_prepend(ROOT / "examples" / folder)


def test_the_code_of_the_page_is_the_file():
    blocks = re.findall(r"```python\n(.*?)\n```", PAGE, re.DOTALL)
    assert len(blocks) == 10 and all(block in SOURCE for block in blocks)
    assert {name for name in re.findall(r"^(?:async )?(?:def|class) (\w+)", SOURCE, re.MULTILINE)
            if f"my_hooks.{name}" not in PAGE} == set()


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page_is_accepted(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_random_model(tmp_path / "runs" / "quickstart" / "sft" / "hf", seed=0)
    assert main([*shlex.split(line)[2:], "--check"]) == 0, capsys.readouterr().err
    assert "valid: " in capsys.readouterr().out


def test_the_page_has_a_command_for_every_hook():
    keys = {word.partition("=")[0] for line in COMMANDS for word in shlex.split(line)}
    assert {f"algo.hooks.{name}" for name in vars(load([]).algo.hooks)} <= keys
    assert {"data.source", "observe.metrics", "observe.rollouts", "observe.loggers", "eval.functions",
            "reward.routes.math", "reward.shaping"} <= keys


def group(name, rewards, tokens=4):
    def rollout():
        token_ids = np.random.default_rng(0).integers(0, 1000, 1 + tokens).astype(np.int32)
        return Rollout(token_ids, trainable=np.arange(1 + tokens) > 0,
                       rollout_logprobs=np.zeros(1 + tokens, np.float32),
                       finish=Finish.STOP, weight_versions=(), routed_experts=None)

    scores = tuple(Score(reward, "correct" if reward == 1 else "wrong") for reward in rewards)
    return RolloutGroup(Prompt(name, (1,), "", "", "math"), tuple(rollout() for _ in rewards), ("text",) * len(rewards),
                        scores)


def batch_of(groups, *overrides):
    config = load(["algo.phi=1000", "algo.underfull=train_short", *overrides])
    return assemble(groups, config.algo, dp=1, seed=0, step=0, max_response_tokens=16, shaping=config.reward.shaping)[0]


def advantages(batch):
    return [sample.advantage for sample in sorted(batch.samples, key=lambda sample: sample.index)]


def test_an_advantage_of_ones_own_reaches_the_samples():
    found = advantages(batch_of([group("a", [1.0, 0.0, 0.0])], "algo.hooks.advantage=my_hooks.leave_one_out"))
    assert found == pytest.approx([1.0, -0.5, -0.5])


def test_an_advantage_of_a_response_without_a_verdict_is_zero():
    whole = group("a", [1.0, 0.0, 0.0])
    failed = RolloutGroup(whole.prompt, whole.rollouts, whole.texts, (*whole.scores[:2], Score(0.0, "error")))
    found = advantages(batch_of([failed], "algo.hooks.advantage=my_hooks.leave_one_out"))
    assert found == pytest.approx([1.0, -1.0])  # the failed one does not train


def test_a_filter_of_ones_own_leaves_whole_groups_out():
    groups = [group("easy", [1.0, 1.0, 1.0, 1.0]), group("mixed", [1.0, 0.0, 1.0, 0.0])]
    batch = batch_of(groups, "algo.hooks.group_filter=my_hooks.not_too_easy")
    assert batch.num_responses == 4 and {sample.index for sample in batch.samples} == {4, 5, 6, 7}


def test_shaping_changes_rewards_and_no_verdict():
    repeated = group("a", [1.0, 0.0], tokens=400)
    repeated.rollouts[0].token_ids[1:] = 5
    config = load(["reward.shaping=[{term: my_hooks.repetition_penalty}]"])
    rewards = BudgetFill(config.algo, 1, 1000, config.reward.shaping).rewards(repeated)
    assert rewards.tolist() == pytest.approx([0.9, 0.0]) and [score.value for score in repeated.scores] == [1.0, 0.0]


def test_a_loss_of_ones_own_is_the_one_that_trains():
    """By hand: clipped from above only, over sqrt(length) x responses; slices add up to the step."""
    import my_hooks

    new = torch.tensor([0.5, 0.1, -0.3, 9.0], requires_grad=True)
    old, mask = torch.zeros(4), torch.tensor([True, True, True, False])
    advantage, lengths = torch.tensor([1.0, 1.0, -2.0, 7.0]), torch.tensor([4.0, 4.0, 1.0, 1.0])
    totals = StepTotals(phi=8, selected_tokens=3, num_responses=2, max_response_tokens=4)
    config = C3POLossConfig(kl_coef=0.0, entropy_coef=0.0)

    def loss(part):
        return policy_loss(new[part], old[part], advantage[part], mask[part], config=config,
                           denominator=my_hooks.per_root_length(totals, lengths[part]),
                           surrogate=my_hooks.soft_clip)[0]

    by_hand = -(1.2 * 1 / 4 + math.exp(0.1) / 4 + math.exp(-0.3) * -2 / 2)
    assert loss(slice(0, 4)).item() == pytest.approx(by_hand, rel=1e-6)
    assert (loss(slice(0, 2)) + loss(slice(2, 4))).item() == pytest.approx(by_hand, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss(slice(0, 4)), new)
    assert gradient.tolist() == pytest.approx([0.0, -math.exp(0.1) / 4, math.exp(-0.3), 0.0], rel=1e-6)


@pytest.mark.parametrize("hooks", [["surrogate"], ["denominator"], ["surrogate", "denominator"]])
def test_the_trainers_objective_asks_the_functions(hooks):
    names = {"surrogate": "my_hooks.soft_clip", "denominator": "my_hooks.per_root_length"}
    algo = load(["algo.loss.kl_coef=0", "algo.loss.entropy_coef=0",
                 *(f"algo.hooks.{name}={names[name]}" for name in hooks)]).algo
    import my_hooks

    batch, logprobs_T = microbatch()
    expected, _ = policy_loss(
        logprobs_T, batch.old_logprobs, batch.advantages, batch.loss_mask, config=algo.loss,
        denominator=my_hooks.per_root_length(TOTALS, batch.response_lengths) if "denominator" in hooks else TOTALS.phi,
        surrogate=my_hooks.soft_clip if "surrogate" in hooks else None)
    torch.testing.assert_close(evaluate(algo)[0], expected)


WRONG = [
    ("advantage", "lambda rewards, judged: rewards[0]", "of shape (3,) instead of (2, 3)"),
    ("advantage", "lambda rewards, judged: rewards / 0", "not finite"),
    ("advantage", "lambda rewards, judged: 'none'", "str instead of numbers"),
    ("advantage", "lambda rewards: rewards", "raised TypeError"),
    ("surrogate", "lambda *given, **bounds: given[0]", "has no attribute"),
    ("surrogate", "lambda *given, **bounds: 1 / 0", "ZeroDivisionError"),
    ("denominator", "lambda totals, lengths: 0", "must be positive"),
    ("denominator", "lambda totals: 1", "positional argument"),
]


@pytest.fixture
def wrong(tmp_path, monkeypatch):
    """write(body) -> the dotted path of the function."""
    def write(body):
        (tmp_path / "wrong_hook_of_test.py").write_text(f"hook = {body}\n")
        return "wrong_hook_of_test.hook"

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wrong_hook_of_test", raising=False)
    return write


@pytest.mark.parametrize(("name", "body", "said"), WRONG)
def test_a_function_that_returns_nonsense_is_refused_before_anything_starts(name, body, said, wrong, tmp_path, capsys):
    path = wrong(body)
    make_random_model(tmp_path / "model", seed=0)
    assert main(["rl", "--check", "experiment=quickstart", f"model.path={tmp_path / 'model'}",
                 f"run.dir={tmp_path / 'run'}", f"algo.hooks.{name}={path}"]) == 2
    assert f"algo.hooks.{name}={path}" in (error := capsys.readouterr().err) and said in error


@pytest.mark.parametrize(("name", "body", "said"), [
    ("group_filter", "lambda rollouts, scores: 1 / 0", "raised ZeroDivisionError"),
    ("shaping", "lambda group: group.scores[9]", "raised IndexError"),
    ("shaping", "lambda group: [1.0]", "of shape (1,) instead of (2,)"),
    ("shaping", "lambda group: [1.0, float('nan')]", "must be finite"),
    ("shaping", "lambda group: None", "NoneType instead of numbers")])
def test_a_function_that_fails_in_a_step_is_named(name, body, said, wrong):
    path = wrong(body)
    key, value = ("reward.shaping", f"[{{term: {path}}}]") if name == "shaping" else (f"algo.hooks.{name}", path)
    with pytest.raises(ValueError, match=f"^{key}={path} ") as caught:
        batch_of([group("a", [1.0, 0.0])], f"{key}={value}")
    assert said in str(caught.value)


@pytest.mark.parametrize(("body", "said"), [
    ("lambda: 1 / 0", "ZeroDivisionError"), ("lambda: 3", "TypeError"), ("lambda: []", "holds no problem"),
    ("lambda: [{'prompt': '1+1=', 1: 2}]", "row 1: a column's name is text, not 1"),
    ("lambda: [{'prompt': '1+1='}, 'text']", "row 2: a row is a dict of columns, not str"),
    ("lambda: [{'question': '1+1='}]", "set data.prompt_key")])
def test_a_function_that_gives_no_problems_is_named(body, said, wrong):
    path = wrong(body)
    with pytest.raises(ValueError, match=f"data.path={path}") as caught:
        read_problems(load(["data.source=function", f"data.path={path}"]).data)
    assert said in str(caught.value)
