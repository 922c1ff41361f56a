"""The HTML report: complete, self-contained, honest about what is missing. In a browser: test_report_in_browser.py."""

import html
import json
import re

import pytest

from megatron_rl.cli import main
from megatron_rl.observe.plots import smoothing_window
from megatron_rl.observe.report import write_report
from tests.megatron_rl.observe.runs import PLOTS, make_run


def report(tmp_path, *runs):
    return write_report(list(runs), tmp_path / "out" / "report.html").read_text()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The report of a run with every metric, whose steps have the rewards 0.123456789."""
    folder = tmp_path_factory.mktemp("full")
    return report(folder, make_run(folder / "run", **{"reward/mean": 0.123456789}))


def test_every_plot_of_a_full_run_is_there(full):
    drawn = re.findall(r'role="img" aria-label="([^"]*)"', full)
    assert drawn == ["Held-out accuracy", *(plot.title for plot in PLOTS), "Time per phase"]


def test_needs_no_other_file_and_no_network(full):
    without_namespaces = full.replace('"http://www.w3.org/2000/svg"', "")  # the name of a namespace, no address
    assert "http" not in without_namespaces
    assert not re.search(r"<(script \w|link|img|iframe)|@import|fetch\(|url\((?!#)", full)


def test_plots_take_every_colour_from_the_page(full):
    colors = [line["color"] for plot in plots_in(full).values() for line in plot["lines"]]
    assert len(colors) > len(PLOTS) and all("var(--" in color for color in colors)


def make_short_run(directory):
    """A run that logged one step and nothing but its loss."""
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n')
    return directory


def test_a_missing_metric_leaves_its_plot_out(tmp_path):
    assert re.findall(r'aria-label="([^"]*)"', report(tmp_path, make_short_run(tmp_path / "run"))) == ["Loss"]


def test_a_directory_without_metrics_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty/metrics\.jsonl does not exist"):
        report(tmp_path, tmp_path / "empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty/metrics\.jsonl holds no step"):
        report(tmp_path, tmp_path / "empty")


def test_result_table_shows_stages_with_their_intervals(full):
    result = full[full.index("<h2>Result</h2>"):]
    assert re.findall(r"<tr><td>([^<]*)</td><td class=number>([^<]*)", result)[:3] == [
        ("before SFT", "0.010 [0.000, 0.030]"), ("after SFT", "0.400 [0.390, 0.420]"),
        ("after RL", "0.676 [0.666, 0.696]")]


def test_comparison_lists_the_keys_that_differ_and_no_others(tmp_path):
    text = report(tmp_path, make_run(tmp_path / "a"), make_run(tmp_path / "b", objective="grpo"))
    differences = text[text.index("<h2>Configuration differences</h2>"):text.index("<h2>Step by step</h2>")]
    assert re.findall(r"<td>([^<]*)</td>", differences) == ["algo.objective", "&quot;c3po&quot;", "&quot;grpo&quot;"]


def test_runs_of_the_same_name_stay_apart(tmp_path):
    text = report(tmp_path, make_short_run(tmp_path / "x" / "rl"), make_short_run(tmp_path / "y" / "rl"))
    assert "<td>x/rl</td>" in text and "<td>y/rl</td>" in text


def test_a_comparison_leaves_the_report_of_the_first_run_alone(tmp_path):
    one, other = make_short_run(tmp_path / "one"), make_short_run(tmp_path / "other")
    assert main(["report", str(one)]) == main(["report", str(one), str(other)]) == 0
    assert "2 runs compared" in (one / "comparison.html").read_text()
    assert "2 runs compared" not in (one / "report.html").read_text()


def test_names_are_escaped(tmp_path):
    text = report(tmp_path, make_short_run(tmp_path / "<b>&run"))
    assert "<b>&run" not in text and "&lt;b&gt;&amp;run" in text


def test_values_that_are_not_finite_are_pointed_out(tmp_path):
    text = report(tmp_path, make_run(tmp_path / "run", **{"train/grad_norm": float("nan")}))
    assert "train/grad_norm at step 1 and 11 more" in text
    assert "Gradient norm" not in re.findall(r'aria-label="([^"]*)"', text)


def plots_in(text):
    """Title -> what page.js is told of the plot."""
    found = [json.loads(html.unescape(each)) for each in re.findall(r'data-numbers="([^"]*)"', text)]
    return {plot["title"]: plot for plot in found}


def test_a_plot_carries_the_numbers_that_are_drawn(full):
    reward = plots_in(full)["Reward"]
    assert reward["lines"] == [{"label": "mean reward", "color": "var(--series-0)", "style": "solid", "run": 0,
                                "constant": False, "window": 1, "steps": list(range(1, 13)), "values": [0.12346] * 12}]


def test_steps_stand_for_seconds_since_the_first_line_and_for_tokens_until_then(full):
    """The first line is the evaluation at time 1000; step s was logged at 1000 + 30 s, with 500 tokens each."""
    (axes,) = json.loads(html.unescape(re.search(r'data-axes="([^"]*)"', full)[1]))
    assert axes == {"step": list(range(13)), "time": [30.0 * step for step in range(13)],
                    "tokens": [500 * step for step in range(13)]}
    assert re.findall(r'data-x="(\w+)"', full) == ["step", "time", "tokens"]


def test_an_axis_that_a_run_lacks_is_not_offered(tmp_path):
    text = report(tmp_path, make_short_run(tmp_path / "short"), make_run(tmp_path / "whole"))
    assert re.findall(r'data-x="(\w+)"', text) == ["step"]


def test_the_evaluation_before_sft_is_no_start_of_the_run(full):
    """0.01 was before SFT; the run began with 0.4 and ended with 0.676. The table of results shows all."""
    (line,) = plots_in(full)["Held-out accuracy"]["lines"]
    assert (line["steps"], line["values"]) == ([0, 6, 12], [0.4, 0.5, 0.676])
    assert "<b>0.400 \u2192 0.676</b>" in full


def test_a_graded_run_is_reported_by_its_rewards(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "eval.jsonl").write_text("".join(json.dumps(
        {"step": step, "label": "during", "mean_reward": 0.25 * step, "mean_reward_low": 0.0, "mean_reward_high": 1.0})
        + "\n" for step in (0, 2)))
    text = report(tmp_path, run)
    assert "Held-out accuracy" not in plots_in(text) and "<b>0.000 \u2192 0.500</b>" in text
    assert plots_in(text)["Held-out mean reward"]["lines"][0]["high"] == [1.0, 1.0]


def test_own_metrics_are_drawn_and_listed(tmp_path):
    text = report(tmp_path, make_run(tmp_path / "run", **{"extra/direct_share": 0.5}))
    assert plots_in(text)["direct share"]["lines"][0]["values"] == [0.5] * 12
    assert "<th class=number>direct share</th>" in text


def test_shares_of_verdicts_lie_on_each_other_and_a_status_that_did_not_occur_is_none(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    (run / "metrics.jsonl").write_text('{"step": 1, "reward/status/wrong": 1.0}\n'
                                       '{"step": 2, "reward/status/correct": 0.75, "reward/status/timeout": 0.25}\n')
    verdicts = plots_in(report(tmp_path, run))["Verdicts"]
    assert verdicts["stacked"] and {line["label"]: line["values"] for line in verdicts["lines"]} == {
        "correct": [0.0, 0.75], "wrong": [1.0, 0.0], "timeout": [0.0, 0.25]}


def test_sampled_responses_are_listed_last_step_first_and_escaped(full):
    table = full[full.index("<h2>Prompts and responses</h2>"):]
    assert "<b>9-2</b>" not in table and "&lt;b&gt;9-2&lt;/b&gt; &amp; more" in table
    steps = [int(step) for step in re.findall(r"<tr><td>(\d+)</td><td><span class=\"verdict", table)]
    assert len(steps) == 36 and steps == sorted(steps, reverse=True)


def test_a_long_run_shows_evenly_spread_samples_and_says_so(tmp_path):
    text = report(tmp_path, make_run(tmp_path / "run", steps=200))
    assert text.count('class="verdict') == 300 and "300 of the 600 in samples.jsonl" in text


def test_long_runs_are_smoothed_over_a_tenth_of_their_steps(tmp_path):
    assert [smoothing_window(steps) for steps in (1, 39, 40, 60, 200)] == [1, 1, 5, 7, 21]
    text = report(tmp_path, make_run(tmp_path / "run", steps=60))
    assert plots_in(text)["Reward"]["lines"][0]["window"] == 7 and "a centred mean over 7 steps" in text
    assert plots_in(text)["Learning rate"]["lines"][0]["window"] == 1
