"""Which checkpoint is chosen, and what is said of each."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from megatron_rl.config.data import SelectConfig
from megatron_rl.config.load import load
from megatron_rl.observe.failures import TooManyFailures
from megatron_rl.observe.selection_plot import plot_selection
from megatron_rl.recipes.quickstart import make_random_model
from megatron_rl.recipes.select_checkpoint import Candidate, choose, measure, run, table
from megatron_rl.types import Finish, Prompt, Rollout, RolloutGroup, Score, VersionSpan


def candidate(epoch, entropy, pass_at_1=0.5, pass_at_k=0.5):
    return Candidate(f"e{epoch}", epoch, None, None, entropy, entropy, entropy, 10.0, 4.0, 0.0, pass_at_1, pass_at_k, 8)


@pytest.mark.parametrize(("candidates", "rule", "chosen", "why"), [
    ([candidate(1, 0.9), candidate(2, 0.45), candidate(3, 0.1)], {}, "e2", "entropy 0.450; best pass_at_k of 1"),
    ([candidate(1, 0.5, 0.9, 0.6), candidate(2, 0.3, 0.2, 0.8), candidate(3, 0.2, 1, 1)], {}, "e2", "of 2 within"),
    ([candidate(1, 0.5, 0.9, 0.6), candidate(2, 0.3, 0.2, 0.8)], {"prefer": "pass_at_1"}, "e1", "best pass_at_1 of 2"),
    ([candidate(1, 0.9), candidate(2, 0.22), candidate(3, 0.1)], {}, "e2", "0.220 is the nearest"),
    ([candidate(1, 0.9), candidate(2, 0.62), candidate(3, 0.1)], {}, "e2", "no entropy within 0.3 to 0.5; 0.620"),
    ([candidate(1, 0.9), candidate(2, 0.4)], {"entropy_low": 0.8, "entropy_high": 1.0}, "e1", "within 0.8 to 1"),
    ([candidate(1, 0.4, 0.1), candidate(2, 0.9, 0.7)], {"rule": "pass_at_1"}, "e2", "best pass_at_1 of all"),
])
def test_the_rule_decides(candidates, rule, chosen, why):
    decision = choose(candidates, SelectConfig(**rule))
    assert decision.chosen == chosen and why in decision.why, decision.why
    assert table(decision).row_count == len(candidates)


def group(logprobs_of_each, values):
    rollouts = tuple(
        Rollout(np.zeros(2 + len(logprobs), np.int32), np.arange(2 + len(logprobs)) >= 2,
                np.array([9.0, 9.0, *logprobs], np.float32), Finish.STOP, (VersionSpan(0, 0, len(logprobs)),))
        for logprobs in logprobs_of_each)
    scores = tuple(Score(0.0, "engine_error", "gone") if value is None else
                   Score(value, "correct" if value else "wrong") for value in values)
    return RolloutGroup(Prompt("p", (1, 2), "q", "7", "math"), rollouts, ("t",) * len(values), scores)


def test_measures_by_hand(tmp_path):
    (tmp_path / "epoch_02").mkdir()
    (tmp_path / "epoch_02" / "epoch.json").write_text('{"epoch": 2, "step": 10, "tokens": 49152}')
    config = load(["experiment=quickstart", "run.steps=6", "algo.phi=4096", "algo.updates_per_rollout=1"])
    groups = [group([[-1.0, -2.0], [-3.0] * 4], [1, 0]), group([[-4.0] * 2, [-0.5] * 4], [0, 0])]
    found = measure(config, groups, tmp_path / "epoch_02")
    assert found.entropy == pytest.approx((1 + 2 + 12 + 8 + 2) / 12)  # over tokens; the prompt's 9.0 do not count
    assert (found.mean_length, found.length_variance) == (3.0, 1.0)
    assert (found.pass_at_1, found.pass_at_k, found.samples) == (0.25, 0.5, 2)
    assert (found.epoch, found.sft_tokens, found.token_efficiency) == (2, 49152, 0.5)  # 6 x 4096 / 49152


def test_failed_responses_count_nowhere_and_too_many_of_them_choose_nothing(tmp_path):
    (path := tmp_path / "epoch_02").mkdir()
    config = load(["experiment=quickstart", "rollout.max_failed_fraction=0.8"])
    whole = [group([[-1.0, -2.0], [-3.0] * 4], [1, 0])]
    failing = [group([[-1.0, -2.0], [-3.0] * 4, []], [1, 0, None]), group([[], [-9.0] * 9, []], [None] * 3)]
    clean, found = (measure(config, groups, path) for groups in (whole, failing))
    assert replace(found, samples=clean.samples) == clean
    with pytest.raises(TooManyFailures, match=r"selection of .*epoch_02: 4 of 6 responses failed .*gone"):
        measure(load(["experiment=quickstart"]), failing, path)
    config = load(["experiment=quickstart", "rollout.max_failed_fraction=1"])
    with pytest.raises(ValueError, match="epoch_02: every response failed"):
        measure(config, failing[1:], path)


@pytest.mark.parametrize(("overrides", "message"), [
    (["rollout.engine.urls=[http://127.0.0.1:9]"], "starts its own engines"),
    (["rollout.temperature=0.8"], "temperature=0.8"),
    (["select.folder=/nowhere"], "select.folder=/nowhere has no epochs")])
def test_what_cannot_be_measured_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        run(load(["experiment=quickstart", *overrides]), None)


def test_wrong_data_shows_before_an_engine_starts(tmp_path):
    make_random_model(tmp_path / "epochs" / "epoch_01", seed=0)
    given = ["experiment=quickstart", f"select.folder={tmp_path}", f"run.dir={tmp_path / 'run'}"]
    for override, message in (("reward.routes={code: exact}", "reward.routes.math"),
                              ("rollout.max_response_tokens=127", "tokens, longer than 1")):
        with pytest.raises(ValueError, match=message):
            run(load([*given, override]), lambda *_: pytest.fail("an engine was started"))


def test_the_plot_is_written(tmp_path):
    plot_selection([asdict(candidate(i, 0.2 * i)) for i in (1, 2, 3)], 0.3, 0.5, "e2", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
