"""The HTML report: complete, self-contained, honest about what is missing, readable on narrow and wide screens."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from megatron_rl.observe.plots import PHASES, PLOTS, running_mean
from megatron_rl.observe.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def make_run(directory, steps=12, objective="c3po", **changes):
    """A run directory with every metric that the report plots."""
    directory.mkdir(parents=True)
    keys = [key for plot in PLOTS for key in (*plot.series, *plot.constants)]
    keys += [f"time/{phase}" for phase in PHASES] + [f"router/load_max_over_mean/layer_{layer}" for layer in range(12)]
    rows = [{"step": step, "time": 1000.0 + step, **dict.fromkeys(keys, 0.1 + step / 100), **changes}
            for step in range(1, steps + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = [(0, "before_sft", 0.01), (0, "after_sft", 0.4), (6, "during", 0.5), (steps, "after_rl", 0.676)]
    (directory / "eval.jsonl").write_text("".join(
        json.dumps({"step": step, "label": label, "accuracy": value, "low": value - 0.01, "high": value + 0.02}) + "\n"
        for step, label, value in stages))
    (directory / "config.json").write_text(json.dumps({"c3po": {"objective": objective, "phi": 4096}}))
    (directory / "versions.json").write_text(json.dumps({"python": "3.12.1", "git": None}))
    return directory


def report(tmp_path, *runs):
    return write_report(list(runs), tmp_path / "out" / "report.html").read_text()


def test_every_plot_of_a_full_run_is_there(tmp_path):
    text = report(tmp_path, make_run(tmp_path / "run"))
    drawn = re.findall(r'role="img" aria-label="([^"]*)"', text)
    assert drawn == ["Held-out accuracy", *(plot.title for plot in PLOTS), "Time per phase"]


def test_needs_no_other_file_and_no_network(tmp_path):
    text = report(tmp_path, make_run(tmp_path / "run"))
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "http" not in without_namespaces
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", text)


def test_plots_take_every_colour_from_the_page(tmp_path):
    svgs = re.findall(r"<svg.*?</svg>", report(tmp_path, make_run(tmp_path / "run")), flags=re.DOTALL)
    colors = {color for svg in svgs for color in re.findall(r"(?:fill|stroke): *(#\w+)", svg)}
    assert colors == set()


def test_a_missing_metric_leaves_its_plot_out(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n')
    assert re.findall(r'aria-label="([^"]*)"', report(tmp_path, run)) == ["Loss"]


def test_a_directory_without_metrics_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty/metrics\.jsonl does not exist"):
        report(tmp_path, tmp_path / "empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty/metrics\.jsonl holds no step"):
        report(tmp_path, tmp_path / "empty")


def test_result_table_shows_stages_with_their_intervals(tmp_path):
    text = report(tmp_path, make_run(tmp_path / "run"))
    result = text[text.index("<h2>Result</h2>"):]
    assert re.findall(r"<tr><td>([^<]*)</td><td class=number>([^<]*)", result)[:3] == [
        ("before SFT", "0.010 [0.000, 0.030]"), ("after SFT", "0.400 [0.390, 0.420]"),
        ("after RL", "0.676 [0.666, 0.696]")]


def test_comparison_lists_the_keys_that_differ_and_no_others(tmp_path):
    text = report(tmp_path, make_run(tmp_path / "a"), make_run(tmp_path / "b", objective="grpo"))
    differences = text[text.index("<h2>Configuration differences</h2>"):text.index("<h2>Configuration</h2>")]
    assert re.findall(r"<td>([^<]*)</td>", differences) == ["c3po.objective", "&quot;c3po&quot;", "&quot;grpo&quot;"]


def test_runs_of_the_same_name_stay_apart(tmp_path):
    text = report(tmp_path, make_run(tmp_path / "x" / "rl"), make_run(tmp_path / "y" / "rl"))
    assert f"{tmp_path}/x/rl" in text and f"{tmp_path}/y/rl" in text


def test_names_are_escaped(tmp_path):
    text = report(tmp_path, make_run(tmp_path / "<b>&run"))
    assert "<b>&run" not in text and "&lt;b&gt;&amp;run" in text


def test_values_that_are_not_finite_are_pointed_out(tmp_path):
    text = report(tmp_path, make_run(tmp_path / "run", **{"train/grad_norm": float("nan")}))
    assert "train/grad_norm at step 1 and 11 more" in text
    assert "Gradient norm" not in re.findall(r'aria-label="([^"]*)"', text)


def test_running_mean_keeps_a_constant_and_averages_neighbours():
    assert np.allclose(running_mean(np.full(9, 3.0), 5), 3.0)
    assert np.allclose(running_mean(np.array([0.0, 3.0, 6.0, 0.0]), 3), [1.5, 3.0, 3.0, 3.0])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to lay the page out")
@pytest.mark.parametrize("width", [400, 1280])
def test_page_fits_the_screen_and_its_text_can_be_read(tmp_path, width):
    runs = [make_run(tmp_path / "a_run_with_quite_a_long_name", steps=60), make_run(tmp_path / "b", steps=60)]
    page = write_report(runs, tmp_path / "report.html").read_text()
    # A frame, because a headless window is not narrower than 500 pixels; srcdoc, so that the script may look inside.
    probe = """<script>document.querySelector("iframe").onload = event => {
      const inner = event.target.contentDocument, texts = [...inner.querySelectorAll("svg text")];
      const scale = matrix => Math.hypot(matrix.a, matrix.b);
      const sizes = texts.map(text => parseFloat(getComputedStyle(text).fontSize) * scale(text.getScreenCTM()));
      document.title = JSON.stringify({width: inner.documentElement.scrollWidth, texts: texts.length,
        smallest: Math.min(...sizes), plots: inner.querySelectorAll("svg").length}); }</script>"""
    frame = tmp_path / "frame.html"
    frame.write_text(f'<title></title><iframe style="border:0;width:{width}px;height:900px" '
                     f'srcdoc="{html.escape(page)}"></iframe>{probe}')
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
         "--virtual-time-budget=5000", "--window-size=1400,1000", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert found["plots"] >= len(PLOTS)
    assert found["width"] <= width, "the page scrolls sideways"
    assert found["texts"] > 100 and found["smallest"] >= 10, "labels are smaller than 10 pixels"
