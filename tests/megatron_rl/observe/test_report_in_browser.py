"""The report as Chromium shows it: no complaint, every plot there to be seen, on a wide screen and on a telephone's."""

from __future__ import annotations

import re

import pytest

from megatron_rl.observe.report import write_report
from tests.browser import browser, needs_browser
from tests.megatron_rl.observe.runs import PLOTS, make_run

pytestmark = [pytest.mark.slow, needs_browser]

# Of each plot its place in the window and whether it has ink; of the page its width and the smallest label.
LOOK = """(() => {
  const texts = [...document.querySelectorAll("svg text")], scale = matrix => Math.hypot(matrix.a, matrix.b);
  const plots = [...document.querySelectorAll("svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    const ink = [...svg.querySelectorAll("path")].filter(path => {
      const size = path.getBoundingClientRect();
      return size.width + size.height > 50 && getComputedStyle(path).stroke + getComputedStyle(path).fill != "nonenone";
    });
    return {title: svg.getAttribute("aria-label"), left: box.left, right: box.right, width: box.width,
      height: box.height, visible: svg.checkVisibility({opacityProperty: true, visibilityProperty: true}),
      ink: ink.length};
  });
  const broken = [...document.querySelectorAll("td")].filter(cell =>
    cell.innerText.length > 4 && cell.getBoundingClientRect().width < 30).map(cell => cell.innerText);
  return {plots, broken, width: document.documentElement.scrollWidth,
    smallest: Math.min(...texts.map(text => parseFloat(getComputedStyle(text).fontSize) * scale(text.getScreenCTM()))),
    page: getComputedStyle(document.body).backgroundColor, text: getComputedStyle(document.body).color,
    label: texts.length && getComputedStyle(texts[0]).fill};
})()"""

# The pointer over the middle of the reward's plot: what it is told there, and how many plots mark the step.
POINT = """(() => {
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
    expected = {"Held-out accuracy", *(plot.title for plot in PLOTS if not plot.per_layer)}
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
    ("<style>.plots { grid-template-columns: repeat(12, 1fr) }</style>", "a label of"),
])
def test_a_page_that_cannot_be_read_is_noticed(chromium, pages, tmp_path, harm, said):
    broken = tmp_path / "broken.html"
    broken.write_text(pages[1].read_text().replace("</body>", f"{harm}</body>"))
    assert said in "\n".join(complaints(chromium.visit(broken, LOOK, width=1280), 1280))
