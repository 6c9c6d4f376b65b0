"""The report in a real browser: drawn, usable by keyboard, on a phone, in the dark, on paper, and without a network."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import shape_moe
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import TASKS, examples
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.session import ExampleOptions
from shape_moe.scoring.scores import read_scores
from shape_moe.selection.select import SelectOptions, select_from_scores, select_from_trace
from support.browser import Browser, open_browser
from support.data import routing_trace, write_lines
from support.results import write_evaluation, write_sweep

pytestmark = pytest.mark.browser
HOSTILE = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>%{y}"
PLOTS = """
return [...document.querySelectorAll(".plot")].map((plot) => ({
  name: plot.id.slice("plot-".length),
  traces: plot._fullData.filter((trace) => trace.visible === true).length,
  width: plot.querySelector(".main-svg").getBoundingClientRect().width,
  height: plot.querySelector(".main-svg").getBoundingClientRect().height,
  room: plot.getBoundingClientRect().width,
  marks: plot.querySelectorAll(".heatmaplayer image, .barlayer .point path, .scatterlayer .points path").length,
  label: plot.getAttribute("aria-label"),
}))
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(autouse=True)
def _plain(browser) -> Iterator[None]:
    """A desktop in daylight, whatever the test before did."""
    browser.screen(1200)
    browser.media()
    yield
    browser.run("try { localStorage.clear() } catch {}")


@pytest.fixture(scope="module")
def demo(embedded, tmp_path_factory) -> Path:
    """The report of the embedded model, traced on all of its six tasks and pruned."""
    folder = tmp_path_factory.mktemp("demo")
    rows = [record for task in TASKS for record in examples(task, 3, seed=0)]
    write_lines(folder / "tasks.jsonl", rows)
    options = PruneOptions(
        trace=ExampleOptions(DataOptions(str(folder / "tasks.jsonl"))),
        select=SelectOptions(keep=0.6),
        device="cpu",
        check_logits=False,
    )
    shape_moe.prune(embedded, folder / "pruned", options)
    return shape_moe.report(folder / "pruned", folder / "demo.html", model=embedded).path


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """The report of a sweep of 48 layers of 128 experts, with everything in it."""
    folder = tmp_path_factory.mktemp("large")
    trace = routing_trace(48, 128, 8, 6000)
    (folder / "trace").mkdir()
    trace.save(folder / "trace")
    selection = select_from_trace(trace, SelectOptions(keep=0.6))
    selection.save(folder / "recommended.json")
    write_sweep(folder, fingerprint=trace.info.fingerprint)
    write_evaluation(folder)
    return shape_moe.report(folder, folder / "large.html", evaluation=folder).path


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A report whose every name is an attack."""
    folder = tmp_path_factory.mktemp("hostile")
    trace = routing_trace(model=HOSTILE)
    (folder / "trace").mkdir()
    trace.save(folder / "trace")
    methods = ((HOSTILE, "coverage"), ("shape", HOSTILE))
    write_sweep(folder, model=HOSTILE, split=HOSTILE, reason=HOSTILE, methods=methods)
    models = json.loads(write_evaluation(folder).read_text())["models"]
    for place, model in enumerate(models):
        model["name"] = f"{place} {HOSTILE}"
    write_evaluation(folder, model=HOSTILE, data=HOSTILE, models=models)
    return shape_moe.report(folder, folder / "hostile.html", evaluation=folder).path


@pytest.fixture(scope="module", params=["demo", "large", "published"])
def page(request, tmp_path_factory) -> Path:
    if request.param != "published":
        return request.getfixturevalue(request.param)
    values = request.getfixturevalue("reference") / "gsm8k_shapley_values.csv"
    selection = select_from_scores(read_scores(values), SelectOptions(keep=0.6))
    return shape_moe.report(values, tmp_path_factory.mktemp("published") / "r.html", selection=selection).path


def test_opens_alone_and_draws_everything(browser, page) -> None:
    browser.open(page)
    assert browser.log() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page.resolve().as_uri()]
    plots = browser.run(PLOTS)
    assert len(plots) >= 3
    for plot in plots:
        assert plot["traces"] > 0, plot
        assert plot["marks"] > 0, plot
        assert plot["width"] > 250, plot
        assert plot["height"] > 100, plot
        assert plot["width"] <= plot["room"] + 1, plot
        assert len(plot["label"]) > 20, plot


def test_opens_within_three_seconds_and_eight_megabytes(browser, page) -> None:
    assert page.stat().st_size < 8e6
    assert 0.1 < min(browser.seconds_to_open(page) for _ in range(3)) < 3


def test_hovering_tells_layer_and_expert(browser, demo) -> None:
    browser.open(demo)
    browser.run("document.querySelector('#plot-values').scrollIntoView({block: 'center', behavior: 'instant'})")
    box = browser.run(
        "const box = document.querySelector('#plot-values .nsewdrag').getBoundingClientRect();"
        "return [box.left + 20, box.top + 20]"
    )
    for shift in (0, 3):
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + shift, y=box[1])
    browser.until("return document.querySelector('#plot-values .hoverlayer').textContent.includes('layer 0, expert')")
    text = browser.run("return document.querySelector('#plot-values .hoverlayer').textContent")
    assert "kept" in text
    assert "rank 1" in text
    assert "tokens" in text


def curve(browser: Browser) -> list[float]:
    return browser.run("return Array.from(document.querySelector('#plot-coverage')._fullData[1].y)")


def test_layers_are_chosen_by_keyboard(browser, demo) -> None:
    browser.open(demo)
    first, labels = curve(browser), [plot["label"] for plot in browser.run(PLOTS)]
    select = browser.driver.find_element(By.ID, "layer")
    browser.run("arguments[0].focus()", select)
    browser.press(Keys.ARROW_DOWN, Keys.TAB)  # some platforms change a list only when it is left
    browser.until("return document.querySelector('#layer').value === '1'")
    assert curve(browser) != first
    changed = [a != b["label"] for a, b in zip(labels, browser.run(PLOTS), strict=True)]
    assert sum(changed) == 3  # coverage, matrix and pairs move together
    assert "Layer 1:" in browser.driver.find_element(By.ID, "line-of-coverage").text
    browser.press(Keys.ENTER)  # the focus is on the button after the list
    browser.until("return document.querySelector('#layer').value === '2'")
    back = browser.driver.find_element(By.CSS_SELECTOR, ".layer-bar button[data-step='-1']")
    browser.run("arguments[0].focus()", back)
    browser.press(Keys.SPACE, Keys.SPACE)
    browser.until("return document.querySelector('#layer').value === '0'")
    assert curve(browser) == first
    assert not back.is_enabled()
    assert browser.log() == []


def test_every_chapter_has_a_layer_of_its_own(browser, tmp_path) -> None:
    trace = routing_trace()
    for name, info in (("a", trace.info), ("b", replace(trace.info, fingerprint="sha256:" + "b" * 64))):
        (tmp_path / name).mkdir()
        replace(trace, info=info).save(tmp_path / name)
    browser.open(shape_moe.report([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html").path)
    first = curve(browser)
    second = "return Array.from(document.querySelector('#plot-coverage-2')._fullData[1].y)"
    assert browser.run(second) == first
    browser.run("document.querySelector('#layer-2').parentElement.querySelectorAll('button')[1].click()")
    assert browser.run(second) != first
    assert curve(browser) == first
    assert browser.run("return [layer.value, document.querySelector('#layer-2').value]") == ["0", "1"]
    assert browser.log() == []


def test_a_click_on_a_row_chooses_its_layer(browser, demo) -> None:
    browser.open(demo)
    browser.run("document.querySelector('#plot-values').scrollIntoView({block: 'center', behavior: 'instant'})")
    x, y = browser.run(
        "const box = document.querySelector('#plot-values .nsewdrag').getBoundingClientRect();"
        "return [box.left + box.width / 2, box.bottom - 8]"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    browser.until("return document.querySelector('#layer').value === '3'")


def test_views_are_chosen_by_keyboard(browser, large) -> None:
    browser.open(large)
    shown = "return JSON.stringify(document.querySelector('#plot-sweep')._fullData.map((trace) => trace.y))"
    first = browser.run(shown)
    radio = browser.driver.find_element(By.CSS_SELECTOR, "input[data-view=sweep]")
    browser.run("arguments[0].focus()", radio)
    browser.press(Keys.ARROW_RIGHT)
    browser.until(f"{shown.replace('return ', 'return (')}) !== arguments[0]", first)
    assert "Exact match" in browser.driver.find_element(By.ID, "line-of-sweep").text
    values = browser.driver.find_element(By.CSS_SELECTOR, "input[data-view=values]")
    browser.run("arguments[0].focus()", values)
    browser.press(Keys.ARROW_RIGHT)
    title = "return document.querySelector('#plot-values').layout.xaxis.title.text"
    browser.until(f"{title} === 'expert id'")
    kept = browser.run(
        "const plot = document.querySelector('#plot-values'); const [kept, dropped] = plot._fullData;"
        "return kept.z.map((row, i) => Array.from(row).map("
        "  (cell, j) => (cell === null) !== (dropped.z[i][j] === null)))"
    )
    assert all(all(row) for row in kept)  # every cell is in one of the two
    assert browser.log() == []


def colours(browser: Browser) -> tuple[str, str, str]:
    return tuple(
        browser.run(
            "return [getComputedStyle(document.body).backgroundColor,"
            "document.querySelector('#plot-layers .xtick text').style.fill,"
            "document.querySelector('#plot-layers .barlayer .point path').style.fill]"
        )
    )


def test_dark_and_light(browser, demo) -> None:
    browser.open(demo)
    light = colours(browser)
    browser.media(dark=True)
    browser.until("return getComputedStyle(document.body).backgroundColor !== arguments[0]", light[0])
    browser.until("return document.querySelector('#plot-layers .xtick text').style.fill !== arguments[0]", light[1])
    dark = colours(browser)
    assert all(a != b for a, b in zip(light, dark, strict=True))
    chosen = browser.driver.find_element(By.CSS_SELECTOR, "#theme input[value=auto]")
    browser.run("arguments[0].focus()", chosen)
    browser.press(Keys.ARROW_RIGHT)  # light, against the system
    browser.until("return document.querySelector('#plot-layers .xtick text').style.fill === arguments[0]", light[1])
    assert colours(browser) == light
    browser.open(demo)
    assert colours(browser) == light  # remembered
    browser.media(dark=False)
    browser.run("arguments[0].click()", browser.driver.find_element(By.CSS_SELECTOR, "#theme input[value=dark]"))
    browser.until("return document.querySelector('#plot-layers .xtick text').style.fill === arguments[0]", dark[1])
    assert colours(browser) == dark
    assert browser.log() == []


def test_a_phone_needs_no_sideways_scrolling(browser, page) -> None:
    browser.screen(360, 740, phone=True)
    browser.open(page)
    width = browser.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert width == [360, 360]
    for plot in browser.run(PLOTS):
        assert plot["marks"] > 0, plot
        assert 250 < plot["width"] <= 340, plot
    outside = browser.run(
        "return [...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > 361"
        " && !e.closest('.scroll, .plot, svg')).map((e) => e.outerHTML.slice(0, 90))"
    )
    assert outside == []
    assert browser.log() == []


def test_turning_the_phone_draws_anew(browser, demo) -> None:
    browser.screen(360, 740, phone=True)
    browser.open(demo)
    browser.screen(740, 360, phone=True)
    browser.until("return document.querySelector('#plot-layers .main-svg').getBoundingClientRect().width > 600")


def test_paper_is_light_and_has_no_controls(browser, large) -> None:
    browser.media(dark=True)
    browser.open(large)
    browser.run(
        "window.seen = []; const plot = document.querySelector('#plot-layers');"
        "addEventListener('beforeprint', () => window.seen.push(["
        "  plot.querySelector('.main-svg').getBoundingClientRect().width,"
        "  plot.querySelector('.xtick text').style.fill]))"
    )
    dark = colours(browser)
    pdf = base64.b64decode(browser.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])
    assert pdf.startswith(b"%PDF")
    assert 4 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 16
    ((width, fill),) = browser.run("return window.seen")
    assert width == 688
    assert fill != dark[1]
    assert colours(browser) == dark  # as it was
    browser.media("print", dark=True)
    shown = browser.run(
        "return [...document.querySelectorAll('#theme, nav, .control, summary')]"
        "  .filter((e) => e.offsetWidth > 0).length"
    )
    assert shown == 0
    assert colours(browser)[0] == "rgb(255, 255, 255)"
    assert browser.log() == []


def test_hostile_names_are_shown_and_do_nothing(browser, hostile) -> None:
    browser.open(hostile)
    assert browser.log() == []
    assert browser.run("return window.hacked") is None
    assert browser.run("return document.images.length") == 0
    assert HOSTILE in browser.driver.find_element(By.TAG_NAME, "h1").text
    ticks = browser.run("return [...document.querySelectorAll('#plot-quality .ytick text')].map((e) => e.textContent)")
    assert len(ticks) == 3
    assert all(tick.endswith("window.hacked=1>%{y}") for tick in ticks)


def test_commands_are_copied_as_they_are_typed(browser, demo) -> None:
    browser.screen(360, 740, phone=True)
    browser.open(demo)
    copied = browser.run(
        "getSelection().selectAllChildren(document.querySelector('#provenance .commands'));"
        "return getSelection().toString()"
    )
    lines = copied.strip().split("\n")
    assert [line.split(" ")[:2] for line in lines] == [["shape-moe", verb] for verb in ("trace", "select", "prune")]
    assert (
        lines[1] == "shape-moe select trace --keep 0.6 --scorer shape --rule coverage --routing drop -o selection.json"
    )
    broken = browser.run(
        "return [...document.querySelectorAll('.commands span')].filter((e) => e.textContent.startsWith('-')"
        " && e.getClientRects()[0].height > 30).length"
    )
    assert broken == 0  # no option is torn apart


def test_tables_can_be_reached_and_scrolled_by_keyboard(browser, large) -> None:
    browser.open(large)
    summary = browser.driver.find_element(By.CSS_SELECTOR, "#figure-layers summary")
    browser.run("arguments[0].focus()", summary)
    browser.press(Keys.ENTER, Keys.TAB)
    assert browser.run("return document.activeElement.closest('#figure-layers .scroll') !== null")
    browser.press(Keys.PAGE_DOWN)
    browser.until("return document.activeElement.scrollTop > 0")
    rows = browser.driver.find_elements(By.CSS_SELECTOR, "#figure-layers tbody tr")
    assert len(rows) == 48
