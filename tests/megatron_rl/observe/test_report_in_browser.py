"""The report as Chromium shows it: no complaint, every plot there to be seen, on a wide screen and on a telephone's."""

from __future__ import annotations

import json
import re

import pytest

from megatron_rl.observe.report import write_report
from tests.browser import browser, needs_browser
from tests.megatron_rl.observe.runs import PLOTS, make_run

pytestmark = [pytest.mark.slow, needs_browser]

# Of each plot its place in the window and whether it has ink; of the page its width and the smallest label.
LOOK = """(async () => {
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const texts = [...document.querySelectorAll("svg text")], scale = matrix => Math.hypot(matrix.a, matrix.b);
  const plots = [...document.querySelectorAll("svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    const ink = [...svg.querySelectorAll("path")].filter(path => {
      const size = path.getBoundingClientRect();
      const style = getComputedStyle(path), drawn = !["grid", "axis"].includes(path.className.baseVal);
      return drawn && size.width + size.height > 50 && style.stroke + style.fill != "nonenone";
    });
    return {title: svg.getAttribute("aria-label"), left: box.left, right: box.right, width: box.width,
      height: box.height, visible: svg.checkVisibility({opacityProperty: true, visibilityProperty: true}),
      ink: ink.length};
  });
  const wide = [...document.querySelectorAll(".scroll")].filter(frame => frame.scrollWidth > frame.clientWidth + 2)
    .map(frame => ({marked: getComputedStyle(frame).maskImage !== "none", bar: getComputedStyle(frame).overflowX,
      scrolls: (frame.scrollLeft = 40, frame.scrollLeft), title: frame.innerText.slice(0, 20)}));
  const broken = [...document.querySelectorAll("td")].filter(cell =>
    cell.innerText.length > 4 && cell.getBoundingClientRect().width < 30).map(cell => cell.innerText);
  return {plots, broken, wide, width: document.documentElement.scrollWidth,
    smallest: Math.min(...texts.map(text => parseFloat(getComputedStyle(text).fontSize) * scale(text.getScreenCTM()))),
    page: getComputedStyle(document.body).backgroundColor, text: getComputedStyle(document.body).color,
    label: texts.length && getComputedStyle(texts[0]).fill};
})()"""

# The pointer over the middle of the reward's plot: what it is told there, and how many plots mark the step.
POINT = """(async () => {
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const plot = [...document.querySelectorAll(".plot")].find(each => each.querySelector("svg").ariaLabel == "Reward");
  plot.scrollIntoView({block: "center"});
  const box = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width * 0.6, bubbles: true}));
  const told = plot.querySelector(".values").getBoundingClientRect();
  const shown = {text: plot.querySelector(".values").innerText, left: told.left, right: told.right,
    marks: [...document.querySelectorAll(".cursor")].filter(each => each.checkVisibility()).length,
    tellers: [...document.querySelectorAll(".values")].filter(each => each.checkVisibility()).length};
  plot.dispatchEvent(new PointerEvent("pointerleave"));
  return {...shown, after: [...document.querySelectorAll(".cursor, .values")].filter(e => e.checkVisibility()).length};
})()"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The reports of one run and of three."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / name, steps=60, objective=name[0])
            for name in ("a_run_with_quite_a_long_name_that_has_no_place_to_break", "b", "c")]
    return {number: write_report(runs[:number], folder / f"{number}.html") for number in (1, 3)}


def complaints(visit, width: int) -> list[str]:
    """What a reader could not see or read."""
    seen, found = visit.value, list(visit.errors)
    if seen["width"] > width:
        found.append(f"the page is {seen['width']} pixels wide and scrolls sideways")
    if seen["smallest"] < 10:
        found.append(f"a label of {seen['smallest']:.1f} pixels")
    if seen["broken"]:
        found.append(f"table cells broken letter by letter: {seen['broken']}")
    for frame in seen["wide"]:
        if not (frame["marked"] and frame["bar"] == "scroll" and frame["scrolls"]):
            found.append(f"a table does not show that it scrolls: {frame}")
    for plot in seen["plots"]:
        inside = plot["left"] >= 0 and plot["right"] <= width
        if not (inside and plot["width"] > 250 and plot["height"] > 150 and plot["visible"] and plot["ink"]):
            found.append(f"{plot} cannot be seen")
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("runs", [1, 3])
def test_every_plot_can_be_seen_and_nothing_is_complained_of(chromium, pages, runs, width, dark):
    visit = chromium.visit(pages[runs], LOOK, width=width, dark=dark)
    assert complaints(visit, width) == []
    expected = {"Held-out accuracy", *(plot.title for plot in PLOTS if not plot.prefix)}
    assert expected <= {plot["title"] for plot in visit.value["plots"]}
    brightness = {name: sum(map(int, re.findall(r"\d+", visit.value[name])[:3])) for name in ("page", "text", "label")}
    assert (brightness["page"] < 200) == dark
    assert all(abs(brightness["page"] - brightness[name]) > 380 for name in ("text", "label")), brightness


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("runs", [1, 3])
def test_the_pointer_is_told_the_numbers_of_its_step(chromium, pages, runs, width):
    visit = chromium.visit(pages[runs], POINT, width=width)
    assert visit.errors == []
    told = visit.value
    step, value = re.search(r"step\s+(\d+)\s.*?\s(0\.\d+)", told["text"], re.DOTALL).groups()
    assert float(value) == pytest.approx(0.1 + int(step) / 100), told["text"]
    assert 20 < int(step) < 45
    assert told["left"] >= 0 and told["right"] <= width
    assert told["tellers"] == 1 and told["marks"] > len(PLOTS) - 3 and told["after"] == 0


@pytest.mark.parametrize(("harm", "said"), [
    ("<script>nothing.there()</script>", "ReferenceError"),
    ("<script>console.error('oh')</script>", "oh"),
    ("<img src=missing.png>", "ERR_FILE_NOT_FOUND"),
    ("<div style='width: 1500px'>wide</div>", "scrolls sideways"),
    ("<style>table td { white-space: normal; min-width: 0; max-width: 1ch; overflow-wrap: anywhere }</style>",
     "letter by letter"),
    ("<style>svg { visibility: hidden }</style>", "cannot be seen"),
    ("<style>svg path { display: none }</style>", "cannot be seen"),
    ("<style>svg text { font-size: 8px }</style>", "a label of"),
    ("<style>.scroll { mask: none !important; -webkit-mask: none !important; width: 200px }</style>", "does not show"),
])
def test_a_page_that_cannot_be_read_is_noticed(chromium, pages, tmp_path, harm, said):
    broken = tmp_path / "broken.html"
    broken.write_text(pages[1].read_text().replace("</body>", f"{harm}</body>"))
    assert said in "\n".join(complaints(chromium.visit(broken, LOOK, width=1280), 1280))


# Chooses each axis in turn, then the logarithmic scale; of the reward's plot its axis and the places of its points.
AXES = """(async () => {
  const frame = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  await frame();
  const look = title => {
    const plot = [...document.querySelectorAll(".plot")].find(each => each.ariaLabel == title);
    const texts = [...plot.querySelectorAll("text")].map(each => each.textContent);
    const points = plot.querySelector("path.line, path.area").getAttribute("d").match(/-?[\\d.]+,-?[\\d.]+/g);
    return {texts, points: points.map(point => point.split(",").map(Number))};
  };
  const seen = {};
  for (const name of ["step", "time", "tokens"]) {
    document.querySelector(`button[data-x=${name}]`).click();
    await frame();
    seen[name] = look("Reward");
  }
  document.querySelector("input.log").click();
  await frame();
  return {...seen, log: look("Reward"), verdicts: look("Verdicts")};
})()"""


def test_the_axis_is_the_readers_choice(chromium, tmp_path):
    """Ten steps with rewards of 1, 10, 100 in turn; each takes longer than the one before, and trains on more."""
    run = make_run(tmp_path / "run", steps=9)
    rows = [{"step": step, "time": 1000.0 + 60 * step ** 2, "reward/mean": 10.0 ** (step % 3),
             "budget/selected_tokens": 1000 * step, "reward/status/correct": 1.0} for step in range(1, 10)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    visit = chromium.visit(write_report([run], tmp_path / "report.html"), AXES, width=1280)
    assert visit.errors == []
    seen = visit.value

    def places(axis: str) -> list[float]:
        """Where each point lies between the first (0) and the last one (1)."""
        along = [x for x, _ in seen[axis]["points"]]
        return [(x - along[0]) / (along[-1] - along[0]) for x in along]

    assert len(seen["step"]["points"]) == 9
    assert places("step") == pytest.approx([place / 8 for place in range(9)], abs=0.005)
    assert places("time") == pytest.approx([(step ** 2 - 1) / 80 for step in range(1, 10)], abs=0.005)
    assert places("tokens") == pytest.approx([(step * (step + 1) / 2 - 1) / 44 for step in range(1, 10)], abs=0.005)
    assert "time since the start" in seen["time"]["texts"] and "trained tokens" in seen["tokens"]["texts"]
    heights = [y for _, y in seen["log"]["points"]]
    assert heights[0] - heights[1] == pytest.approx(heights[2] - heights[0], abs=0.2) and heights[0] > heights[1]
    assert {"1", "10", "100"} <= set(seen["log"]["texts"])
    assert [y for _, y in seen["step"]["points"]][2] - heights[2] != pytest.approx(heights[2] - heights[0], abs=5)
    assert "0.5" in seen["verdicts"]["texts"], "shares that lie on each other stay linear"


# The ends of the y axis of three plots.
SCALES = """(async () => {
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const find = title => [...document.querySelectorAll(".plot")].find(each => each.ariaLabel == title);
  return Object.fromEntries(["Reward", "Learning rate", "Budget fill"].map(title => [title,
    [...find(title).querySelectorAll("text[text-anchor=end]")].map(each => Number(each.textContent))]));
})()"""


def test_a_constant_is_not_magnified_and_sizes_are_seen_from_zero(chromium, tmp_path):
    run = make_run(tmp_path / "run", **{"reward/mean": 4.0, "train/lr": 0.0, "budget/fill": 1.0})
    ends = chromium.visit(write_report([run], tmp_path / "report.html"), SCALES, width=1280).value
    assert min(ends["Reward"]) <= 3.2 and max(ends["Reward"]) >= 4.8
    assert ends["Learning rate"][0] == ends["Budget fill"][0] == 0
    assert max(ends["Budget fill"]) >= 1


# Searches the table of sampled responses, then chooses a verdict as well.
SEARCH = """(() => {
  const part = document.querySelector(".samples"), field = part.querySelector("input");
  const choice = part.querySelector("select");
  const rows = () => [...part.querySelectorAll("tbody tr")].filter(each => each.checkVisibility()).length;
  const type = (element, value) => { element.value = value; element.dispatchEvent(new Event("input")); return rows(); };
  const seen = {all: rows(), word: type(field, "SO 3+4"), none: type(field, "nowhere"), again: type(field, "")};
  seen.verdict = type(choice, "wrong");
  seen.both = type(field, "3+4");
  seen.said = part.querySelector(".found").textContent;
  return seen;
})()"""


@pytest.mark.parametrize("width", [400, 1280])
def test_sampled_responses_are_searched_by_text_and_verdict(chromium, tmp_path, width):
    """Twelve steps with three samples each: one right ("so 3+4=7"), one wrong, one without an answer."""
    page = write_report([make_run(tmp_path / "run")], tmp_path / "report.html")
    visit = chromium.visit(page, SEARCH, width=width)
    assert visit.errors == []
    assert visit.value == {"all": 36, "word": 12, "none": 0, "again": 36, "verdict": 12, "both": 0,
                           "said": "0 of 36 responses"}
