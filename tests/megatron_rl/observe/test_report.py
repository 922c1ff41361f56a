"""The HTML report: complete, self-contained, honest about what is missing. In a browser: test_report_in_browser.py."""

import html
import json
import re

import numpy as np
import pytest

from megatron_rl.cli import main
from megatron_rl.observe.canvas import Canvas, Line, running_mean
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
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", full)
    assert "http" not in without_namespaces
    assert not re.search(r"<(script \w|link|img|iframe)|@import|fetch\(|url\((?!#)", full)


def test_plots_take_every_colour_from_the_page(full):
    svgs = re.findall(r"<svg.*?</svg>", full, flags=re.DOTALL)
    colors = {color for svg in svgs for color in re.findall(r"(?:fill|stroke): *(#\w+)", svg)}
    assert colors == set()


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
    assert re.findall(r"<td>([^<]*)</td>", differences) == ["c3po.objective", "&quot;c3po&quot;", "&quot;grpo&quot;"]


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


def test_running_mean_keeps_a_constant_and_averages_neighbours():
    assert np.allclose(running_mean(np.full(9, 3.0), 5), 3.0)
    assert np.allclose(running_mean(np.array([0.0, 3.0, 6.0, 0.0]), 3), [1.5, 3.0, 3.0, 3.0])


def numbers_in(text):
    return [json.loads(html.unescape(found)) for found in re.findall(r'data-numbers="([^"]*)"', text)]


def test_a_plot_carries_the_numbers_it_draws(full):
    reward = numbers_in(full)[1]
    assert reward["lines"] == [{"label": "mean reward", "color": "var(--series-0)", "steps": list(range(1, 13)),
                                "values": [0.12346] * 12}]
    left, right, first, last = reward["box"]
    assert 0.05 < left < 0.3 < 0.9 < right <= 1.0 and first < 1 < 12 < last


def drawn_axis(values, **options):
    canvas, steps = Canvas("fraction"), np.arange(1.0, 1.0 + len(values))
    canvas.line(steps, np.array(values), "#000000")
    canvas.finish("a plot", (), [Line("a line", "black", steps, np.array(values))], **options)
    return canvas.axes.get_ylim()


def test_a_constant_is_not_magnified_and_sizes_are_seen_from_zero():
    assert drawn_axis([4.0, 4.0]) == (3.0, 5.0)
    assert drawn_axis([0.0, 0.0], from_zero=True) == pytest.approx((-0.02, 1.0))
    low, high = drawn_axis([0.9, 1.0], from_zero=True)
    assert -0.05 < low < 0.0 and 1.0 < high < 1.1
    low, _ = drawn_axis([-2.0, 1.0], from_zero=True)
    assert low < -2.0, "nothing is cut off"
