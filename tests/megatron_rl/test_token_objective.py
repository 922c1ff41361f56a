"""What a configuration makes of the loss of a packed micro-batch."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from c3po import (
    C3POLossConfig,
    Max,
    StepTotals,
    SumCount,
    c3po_loss,
    icepop_weights,
    kpop_weights,
    topk_distillation_loss,
)
from megatron_rl.batch import pack
from megatron_rl.config.distillation import DistillationConfig, TeacherConfig
from megatron_rl.config.load import CONF_DIR, load
from megatron_rl.config.schema import AlgoConfig
from megatron_rl.observe.metrics import reduce_maxima, reduce_metrics
from megatron_rl.train_step.report import TOTALS as TOTALS_REPORTED
from megatron_rl.train_step.report import metric_name
from megatron_rl.trainer.learner import fill_in_teacher
from megatron_rl.trainer.objective import TokenObjective
from megatron_rl.types import TrainSample

TOTALS = StepTotals(phi=10, selected_tokens=7, num_responses=3, max_response_tokens=5)
PLAIN = C3POLossConfig(kl_coef=0.0, entropy_coef=0.0)
UNCLIPPED = replace(PLAIN, clip_eps_low=1.0, clip_eps_high=9.0)


def microbatch():
    """Three responses of 2, 3 (of 4) and 2 tokens after prompts of 1 and 2, and one token of alignment padding."""
    rng = np.random.default_rng(0)
    samples = []
    for index, (prompt, kept, whole, advantage) in enumerate([(2, 2, 2, 1.0), (1, 3, 4, -1.0), (2, 2, 2, 2.0)]):
        length = prompt + kept
        mask = np.arange(length) >= prompt
        samples.append(TrainSample(index, rng.integers(0, 9, length), mask, np.where(mask, -2.0, 0.0), advantage,
                                   whole, sentences=np.arange(length) // 3))
    batch = pack(samples, multiple_of=4)
    assert not bool(batch.real[-1])
    generator = torch.Generator().manual_seed(0)
    batch.old_logprobs = batch.rollout_logprobs + 0.5 * torch.randn(batch.num_tokens, generator=generator)
    batch.old_logprobs[~batch.loss_mask] = math.nan  # whatever the model says of prompts and padding
    return batch, torch.nan_to_num(batch.old_logprobs) + 0.3 * torch.randn(batch.num_tokens, generator=generator)


def evaluate(algo: AlgoConfig, totals: StepTotals = TOTALS):
    batch, logprobs_T = microbatch()
    logprobs_T.requires_grad_()
    loss, report = TokenObjective(algo, totals)(batch, logprobs_T, torch.zeros_like(logprobs_T))
    loss.backward()
    return loss.detach(), report, logprobs_T.grad


def test_the_default_is_c3po_over_phi():
    batch, logprobs_T = microbatch()
    expected, _ = c3po_loss(logprobs_T, batch.old_logprobs, batch.advantages, batch.loss_mask, phi=10, config=PLAIN)
    torch.testing.assert_close(evaluate(AlgoConfig(loss=PLAIN))[0], expected)


@pytest.mark.parametrize(("objective", "divisors"), [
    ("c3po", (10, 10, 10)), ("grpo", (2 * 3, 4 * 3, 2 * 3)), ("dr_grpo", (15, 15, 15)), ("token_mean", (7, 7, 7))])
def test_each_objective_divides_by_its_own(objective, divisors):
    """|y_i| is 4 where 3 tokens of the response are left."""
    batch, _ = microbatch()
    gradient = evaluate(AlgoConfig(objective=objective, loss=PLAIN))[2]
    undivided = evaluate(AlgoConfig(loss=PLAIN), replace(TOTALS, phi=1))[2]
    per_token = torch.tensor(divisors).repeat_interleave(torch.tensor([2, 3, 2]))
    torch.testing.assert_close(gradient[batch.loss_mask] * per_token, undivided[batch.loss_mask])
    assert bool((gradient[~batch.loss_mask] == 0).all())


def test_gspo_sees_the_packed_sequences():
    """On each response one ratio: the gradient per token is the same within it (advantage and divisor are)."""
    gradient = evaluate(AlgoConfig(loss=replace(UNCLIPPED, surrogate="gspo")))[2]
    batch, _ = microbatch()
    for tokens in gradient[batch.loss_mask].split([2, 3, 2]):
        torch.testing.assert_close(tokens, tokens[:1].expand_as(tokens))
        assert tokens[0] != 0


def test_lpo_sees_the_sentences():
    """Sentences end after token 2 of each sequence; the responses are its tokens 2 to 3, 1 to 3 and 2 to 3."""
    gradient = evaluate(AlgoConfig(loss=replace(UNCLIPPED, surrogate="lpo")))[2]
    batch, _ = microbatch()
    found = gradient[batch.loss_mask].tolist()
    assert found[2] == pytest.approx(found[3]) and 0.0 not in found
    assert len({round(value, 6) for value in found}) == 6


def test_phi_divides_the_teachers_term_and_the_surrogate_clips_it_with_the_tasks():
    teacher = DistillationConfig(teachers={"a": TeacherConfig(checkpoint="x")}, coef=0.5)
    gradients = {}
    for name, distillation in (("task", DistillationConfig()), ("both", teacher),
                               ("teacher", replace(teacher, task_reward=False))):
        batch, logprobs_T = microbatch()
        batch.teacher_logprobs = batch.rollout_logprobs.clone()
        batch.teacher_logprobs[batch.loss_mask.nonzero()[-1]] = math.nan  # nobody judged the last token
        logprobs_T.requires_grad_()
        loss, report = TokenObjective(AlgoConfig(loss=UNCLIPPED, distillation=distillation), TOTALS)(
            batch, logprobs_T, torch.zeros_like(logprobs_T))
        loss.backward()
        gradients[name] = logprobs_T.grad[batch.loss_mask]
        assert ("distill_gap" in report) == distillation.on
    gap = torch.where(batch.teacher_logprobs.isnan(), 0.0, batch.old_logprobs - batch.teacher_logprobs)
    ratio = (logprobs_T.detach() - batch.old_logprobs).exp()
    expected = (0.5 * gap * ratio / 10)[batch.loss_mask]  # phi = 10
    torch.testing.assert_close(gradients["teacher"], expected)
    torch.testing.assert_close(gradients["both"], gradients["task"] + expected)
    assert int((expected == 0).sum()) == 1


def test_a_teacher_whose_network_gives_nan_does_not_pass_for_one_that_was_not_asked():
    algo = AlgoConfig(loss=PLAIN, distillation=DistillationConfig(teachers={"a": TeacherConfig(checkpoint="x")}))
    batch, logprobs_T = microbatch()
    batch.teachers[:3] = 0  # the first response; nobody is the teacher of the others
    broken = torch.full_like(logprobs_T, math.nan)
    for place, judged_tokens, is_finite in ((1, 0, True), (0, 2, False)):
        fill_in_teacher(batch, place, broken)
        loss, report = TokenObjective(algo, TOTALS)(batch, logprobs_T, torch.zeros_like(logprobs_T))
        assert (report["distill_gap"].count, bool(loss.isfinite())) == (judged_tokens, is_finite)


@pytest.mark.parametrize("objective", ["c3po", "grpo", "dr_grpo", "token_mean"])
def test_the_dense_term_of_k_tokens_is_added_over_the_same_divisor(objective):
    """Phi and its relatives divide it; without the task's reward it stands alone."""
    batch, logprobs_T = microbatch()
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(batch.num_tokens, 6, generator=generator).log_softmax(-1)[:, :4] for _ in range(2))
    teaching = DistillationConfig(teachers={"a": TeacherConfig(checkpoint="x")}, coef=0.5, top_k=4)
    batch.teacher_ids, batch.teacher_logprobs = torch.zeros(batch.num_tokens, 4, dtype=torch.int64), teacher.clone()
    batch.teacher_logprobs[batch.loss_mask.nonzero()[-1]] = math.nan  # nobody judged the last token
    plain = evaluate(AlgoConfig(objective=objective, loss=PLAIN))[0]
    divisor = TOTALS.denominator(objective, batch.response_lengths)
    dense, sums = topk_distillation_loss(student, batch.teacher_logprobs, batch.loss_mask, coef=0.5,
                                         denominator=divisor)
    for task_reward, expected in ((True, plain + dense), (False, dense)):
        algo = AlgoConfig(objective=objective, loss=PLAIN, distillation=replace(teaching, task_reward=task_reward))
        loss, report = TokenObjective(algo, TOTALS)(batch, logprobs_T, torch.zeros_like(logprobs_T), student)
        torch.testing.assert_close(loss, expected)
        assert report["distill_kl"] == sums["distill_kl"] and report["distill_kl"].count == 6


def test_icepop_is_what_c3po_says():
    batch, logprobs_T = microbatch()
    weights, sums = icepop_weights(batch.old_logprobs, batch.rollout_logprobs, batch.loss_mask, low=0.8, high=1.5)
    expected, _ = c3po_loss(logprobs_T, batch.old_logprobs, batch.advantages, batch.loss_mask, phi=10, config=PLAIN,
                            weights=weights)
    loss, report, _ = evaluate(AlgoConfig(loss=PLAIN, mismatch="icepop", icepop_low=0.8, icepop_high=1.5))
    torch.testing.assert_close(loss, expected)
    assert report["mismatch_weight"].sum == sums["mismatch_weight"].sum > 0
    assert 0 < report["icepop_low_fraction"].sum + report["icepop_high_fraction"].sum < 7


def test_the_mismatch_is_of_the_policy_before_the_update():
    batch, _ = microbatch()
    gap = (batch.old_logprobs - batch.rollout_logprobs)[batch.loss_mask].abs()
    report = evaluate(AlgoConfig(loss=PLAIN))[1]
    assert report["mismatch_abs"].sum == pytest.approx(gap.sum()) and report["mismatch_abs"].count == 7
    assert report["mismatch_max_abs"].value == pytest.approx(gap.max())


def test_entropy_and_the_reference_policy_reach_the_loss():
    batch, logprobs_T = microbatch()
    batch.ref_logprobs = logprobs_T - 0.1
    entropy_T = torch.ones_like(logprobs_T, requires_grad=True)
    algo = AlgoConfig(loss=replace(PLAIN, kl_coef=0.1, kl_estimator="k1", entropy_coef=0.2))
    loss, report = TokenObjective(algo, TOTALS)(batch, logprobs_T, entropy_T)
    loss.backward()
    torch.testing.assert_close(entropy_T.grad, torch.where(batch.loss_mask, -0.2 / 10, 0.0))
    assert report["kl"].sum == pytest.approx(7 * 0.1)


def test_without_a_pass_before_it_the_update_starts_from_its_own_logprobs():
    gradients = []
    for given in (True, False):
        batch, logprobs_T = microbatch()
        batch.old_logprobs = logprobs_T.clone() if given else None
        logprobs_T.requires_grad_()
        TokenObjective(AlgoConfig(loss=PLAIN, mismatch="tis", tis_cap=1.1), TOTALS)(
            batch, logprobs_T, torch.zeros_like(logprobs_T))[0].backward()
        gradients.append(logprobs_T.grad)
    assert torch.equal(*gradients) and bool(gradients[0][batch.loss_mask].all())


def test_every_switch_is_independent_of_the_others():
    """4 objectives x 4 surrogates x 4 corrections x 4 rejections: gradient times product of weights."""
    batch, _ = microbatch()
    old, rollout, selected = batch.old_logprobs, batch.rollout_logprobs, batch.loss_mask
    k = (old - rollout)[selected].exp()  # 0.86 0.34, 1.33 0.58 0.50, 1.52 0.70; geometric means 0.54, 0.73, 1.03
    corrections = {"none": torch.ones(7), "tis": k.clamp(max=1.1),
                   "icepop": torch.where((k >= 0.8) & (k <= 1.5), k, 0.0),
                   "kpop": kpop_weights(old, rollout, selected, max_kl=0.02)[0][selected]}
    mean, veto = {"sequence_ratio_low": 0.5, "sequence_ratio_high": 1.02}, {"sequence_min_token_ratio": 0.4}
    rejections = [({}, [1, 1, 1, 1, 1, 1, 1]), (mean, [1, 1, 1, 1, 1, 0, 0]), (veto, [0, 0, 1, 1, 1, 1, 1]),
                  ({**mean, **veto}, [0, 0, 1, 1, 1, 0, 0])]
    for objective, surrogate in product(("c3po", "grpo", "dr_grpo", "token_mean"), ("ppo", "gspo", "lpo", "cispo")):
        plain = AlgoConfig(objective=objective, loss=replace(UNCLIPPED, surrogate=surrogate), tis_cap=1.1,
                           icepop_low=0.8, icepop_high=1.5, kpop_max_kl=0.02)
        _, _, without = evaluate(plain)
        for (mismatch, weights), (rejection, keep) in product(corrections.items(), rejections):
            _, report, gradient = evaluate(replace(plain, mismatch=mismatch, **rejection))
            expected = without[selected] * weights * torch.tensor(keep)
            torch.testing.assert_close(gradient[selected], expected, rtol=1e-5, atol=1e-6)
            assert ("mismatch_weight" in report) == (mismatch != "none" or bool(rejection))


PACKINGS = ([[0, 1, 2, 3, 4, 5]], [[0], [1], [2], [3], [4], [5]], [[5, 1], [0, 4, 2], [3], []], [[3, 2, 1, 0], [4, 5]])
CORRECTED = {"mismatch": "icepop", "icepop_low": 0.7, "icepop_high": 1.4, "sequence_ratio_low": 0.8,
             "sequence_ratio_high": 1.25, "sequence_min_token_ratio": 0.5}


@pytest.mark.parametrize("surrogate", ["ppo", "gspo", "lpo", "cispo"])
@pytest.mark.parametrize("objective", ["c3po", "grpo", "dr_grpo", "token_mean"])
@pytest.mark.parametrize("correction", [{}, CORRECTED, {"mismatch": "tis"}, {"mismatch": "kpop"}],
                         ids=["none", "icepop and sequences", "tis", "kpop"])
def test_no_metric_depends_on_the_packing(objective, surrogate, correction):
    """Six responses of uneven length in 1 to 6 micro-batches, one of them empty, with and without padding."""
    loss = C3POLossConfig(surrogate=surrogate, kl_coef=0.1, entropy_coef=0.1)
    algo, rng = AlgoConfig(objective=objective, loss=loss, **correction), np.random.default_rng(3)
    lengths = [int(n) for n in rng.integers(3, 12, 6)]
    rows = [rng.normal(scale=0.4, size=(5, n)) - 2.0 for n in lengths]  # rollout, old, new, reference, entropy
    samples = [TrainSample(i, rng.integers(0, 9, n), np.arange(n) >= 2, np.where(np.arange(n) >= 2, rows[i][0], 0.0),
                           float(rng.normal()), n - 2, sentences=np.arange(n) // 4) for i, n in enumerate(lengths)]
    totals = StepTotals(phi=64, selected_tokens=sum(lengths) - 12, num_responses=6, max_response_tokens=10)

    def reported(packing, multiple_of: int) -> dict[str, float]:
        sums, maxima = {}, {}
        for members in packing:
            batch = pack([samples[i] for i in members], multiple_of=multiple_of)
            old, new, batch.ref_logprobs, entropy = (torch.tensor(np.concatenate(
                [[], *(rows[i][row][1:] for i in members), np.zeros(int((~batch.real).sum()))])) for row in range(1, 5))
            batch.old_logprobs = old
            loss, report = TokenObjective(algo, totals)(batch, new, entropy)
            for key, value in {**report, "loss": SumCount(loss, 1)}.items():
                store = maxima if isinstance(value, Max) else sums
                store[key] = value if key not in store else (
                    store[key].merge(value) if isinstance(value, Max) else store[key] + value)
        whole = {key: float(sums.pop(key).sum) for key in TOTALS_REPORTED}
        return {**whole, **reduce_metrics(sums, None), **reduce_maxima(maxima, None)}

    expected = reported(PACKINGS[0], 1)
    assert len(expected) >= 12
    for packing in PACKINGS[1:]:
        for multiple_of in (1, 8):
            assert reported(packing, multiple_of) == pytest.approx(expected, rel=1e-5)  # float32 inputs of a batch


def test_what_the_corrections_report_is_documented():
    reported = set()
    for mismatch in ("tis", "icepop", "kpop"):
        reported |= evaluate(AlgoConfig(loss=PLAIN, mismatch=mismatch, sequence_ratio_low=0.5, sequence_ratio_high=2.0,
                                        sequence_min_token_ratio=0.1))[1].keys()
    page = (CONF_DIR.parent / "docs" / "metrics.md").read_text()
    section = page.split("## Only with a correction")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE))
    assert {metric_name(key) for key in reported - evaluate(AlgoConfig(loss=PLAIN))[1].keys()} == documented


def test_presets_are_the_papers():
    presets = {path.stem: load([f"algo={path.stem}"]).algo for path in (CONF_DIR / "algo").glob("*.yaml")}
    chosen = {name: (algo.objective, algo.loss.surrogate, algo.advantage_scale, algo.loss.clip_eps_low,
                     algo.loss.clip_eps_high, algo.loss.kl_coef, algo.dynamic_sampling)
              for name, algo in presets.items()}
    assert chosen == {
        "c3po": ("c3po", "ppo", "std", 0.2, 0.2, 1e-3, False),
        "grpo": ("grpo", "ppo", "std", 0.2, 0.2, 1e-3, False),
        "dapo": ("token_mean", "ppo", "std", 0.2, 0.28, 0.0, True),
        "dr_grpo": ("dr_grpo", "ppo", "none", 0.2, 0.2, 0.0, False),
        "gspo": ("grpo", "gspo", "std", 3e-4, 4e-4, 0.0, False),
        "cispo": ("token_mean", "cispo", "std", 1.0, 4.0, 0.0, False),
        "lpo": ("token_mean", "lpo", "std", 0.03, 0.03, 0.0, False),
    }
    assert [name for name, algo in presets.items() if algo.has_budget] == ["c3po"]
