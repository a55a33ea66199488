"""All pages in a headless Chromium: no errors, pictures loaded, slider, enlarging, a phone's width, both themes.

Skipped where there is no Chromium or Chrome with its driver (Debian: chromium and chromium-driver).
"""

import os
import shutil
import threading

import pytest

from ase_dist.report.page import watched_report, write_comparison, write_report
from ase_dist.report.watch import Server, WatchedPage
from ase_dist.training.record.metrics import Recorder
from tests.report.conftest import STEPS, train_values, write_run, write_study
from tests.report.test_compare_page import make_runs

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.single_gpu,
    pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="no Chromium or Chrome with its chromedriver here"),
]
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

PHONE, DESKTOP = (390, 844), (1280, 900)
TOO_WIDE = """
const edge = document.documentElement.clientWidth;
const inScroller = (e) => e.closest(".scroll, nav, pre, dialog") !== null;
return [...document.querySelectorAll("body *")].filter(
  (e) => e.getBoundingClientRect().right > edge + 1 && !inScroller(e)).map((e) => e.outerHTML.slice(0, 80));
"""
CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function light(color) {
  canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
  const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
  return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
}
function behind(e) {
  const color = getComputedStyle(e).backgroundColor;
  return color === "rgba(0, 0, 0, 0)" && e.parentElement ? behind(e.parentElement) : color;
}
const hasText = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
return [...document.querySelectorAll("main *, header *, nav *, footer")].filter(
  (e) => !e.closest("svg") && e.offsetParent && hasText(e)).map((e) => {
  const [one, two] = [light(getComputedStyle(e).color), light(behind(e))].sort((a, b) => b - a);
  return [(one + 0.05) / (two + 0.05), e.outerHTML.slice(0, 80)];
}).filter((pair) => pair[0] < 4.5);
"""


def start_browser(profile, *, performance=False):
    """A headless one that keeps its console, and with ``performance`` every request."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    logs = {"browser": "ALL", **({"performance": "ALL"} if performance else {})}
    options.set_capability("goog:loggingPrefs", logs)
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage",
                     f"--user-data-dir={profile}"):  # fmt: skip
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses to run as root with it
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module", params=[write_run, write_study, make_runs], ids=["run", "study", "comparison"])
def page(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "folder"
    made = request.param(folder)
    return write_comparison(made, folder / "compared.html") if isinstance(made, list) else write_report(made)


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    return write_report(write_run(tmp_path_factory.mktemp("pages") / "folder"))


def show(browser, path, *, size=DESKTOP, scheme="light"):
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get_log("browser")  # what an earlier page said
    browser.get(path.as_uri())


def run(browser, script, *arguments):
    return browser.execute_script(script, *arguments)


def fills(browser):
    return run(browser, "return [...document.querySelectorAll('.maps rect')].map((cell) => cell.getAttribute('fill'))")


def test_the_page_opens_without_a_word_and_all_pictures_are_loaded(browser, page):
    show(browser, page)
    widths = run(browser, "return [...document.querySelectorAll('.enlarge img')].map((i) => i.naturalWidth)")
    assert widths and min(widths) > 0
    assert (
        run(browser, "return performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('data:'))") == []
    )
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_nothing_is_wider_than_the_screen_with_all_folds_open(browser, page, size, scheme):
    show(browser, page, size=size, scheme=scheme)
    run(browser, "document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert run(browser, "return document.documentElement.scrollWidth") <= size[0]
    assert run(browser, TOO_WIDE) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser, page, scheme):
    show(browser, page, scheme=scheme)
    run(browser, "document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert run(browser, CONTRAST) == []
    assert run(browser, "return getComputedStyle(document.body).backgroundColor") == {
        "light": "rgb(246, 247, 248)", "dark": "rgb(16, 19, 23)"}[scheme]  # fmt: skip


def test_the_slider_paints_the_maps_of_the_step(browser, run_page):
    show(browser, run_page)
    painted, last = [], fills(browser)
    for i, step in enumerate(STEPS):
        run(browser, "const s = document.getElementById('heat-step'); s.value = arguments[0];"
                     "s.dispatchEvent(new Event('input'))", i)  # fmt: skip
        painted.append(tuple(fills(browser)))
        assert run(browser, "return document.getElementById('heat-label').textContent").startswith(f"step {step},")
    assert len(set(painted)) == len(STEPS) and list(painted[-1]) == last
    run(browser, "const k = document.getElementById('heat-kind'); k.value = 'mean_gates';"
                 "k.dispatchEvent(new Event('change'))")  # fmt: skip
    assert run(browser, "return document.getElementById('heat-top').textContent") == "25 %"


def test_the_script_and_the_page_paint_the_last_record_alike(browser, run_page):
    """What stands in the file, for readers without scripts, is what the script paints from the numbers."""
    show(browser, run_page)
    source = run_page.read_text()
    maps = source[source.index('<div class="maps">') : source.index('id="heat-data"')]
    written = [part.split('"')[1] for part in maps.split(" fill=")[1:]]
    assert written == fills(browser)


def test_a_cell_says_its_number_under_the_pointer(browser, run_page):
    show(browser, run_page)
    run(browser, "document.querySelectorAll('.maps rect')[4].dispatchEvent(new Event('pointermove', {bubbles: true}))")
    told = run(browser, "return document.getElementById('heat-readout').textContent")
    assert told == "layer 1, semseg, expert 4: 100 %"


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_a_picture_enlarges_on_a_click_and_the_next_one_follows(browser, run_page, size):
    show(browser, run_page, size=size)
    button = browser.find_element("css selector", ".shots .enlarge")
    small = button.size["width"]
    run(browser, "arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    shown = browser.find_element("id", "viewer-image")
    assert shown.is_displayed() and shown.size["width"] == 640 > small
    assert shown.get_attribute("alt") == "Step 0" and not browser.find_element("id", "viewer-back").is_enabled()
    browser.find_element("id", "viewer-next").click()
    assert shown.get_attribute("alt") == "Step 3"
    browser.find_element("id", "viewer-fit").click()
    assert shown.size["width"] <= size[0]
    browser.find_element("id", "viewer-close").click()
    assert not shown.is_displayed()
    assert browser.get_log("browser") == []


def test_a_chart_answers_with_the_nearest_value(browser, run_page):
    show(browser, run_page)
    found = run(browser, """
        const figure = document.querySelector("#curves .chart"), svg = figure.querySelector("svg");
        const box = svg.getBoundingClientRect(), value = figure.querySelector(".value");
        const latest = value.textContent;
        svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + 1, clientY: box.top + 9}));
        const told = [value.textContent, figure.querySelector(".note").textContent];
        svg.dispatchEvent(new PointerEvent("pointerleave"));
        return [...told, latest, value.textContent];
    """)  # fmt: skip
    assert found == ["10.00", "step 0", "16.00", "16.00"]


def test_a_chart_of_several_runs_answers_with_the_value_of_each(browser, tmp_path):
    show(browser, write_comparison(make_runs(tmp_path), tmp_path / "compared.html"))
    told = run(browser, """
        const figure = document.querySelector("#curves .chart"), svg = figure.querySelector("svg");
        const box = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + 1, clientY: box.top + 9}));
        return figure.querySelector(".note").textContent;
    """)  # fmt: skip
    assert told == "step 0: first 10.00, second 12.50"


def test_a_link_into_the_table_opens_the_fold(browser, tmp_path):
    show(browser, write_report(write_study(tmp_path / "study")))
    browser.find_element("link text", "Naive shared").click()
    folds = "return [...document.querySelectorAll('#variants > details')].map((fold) => fold.open)"
    WebDriverWait(browser, 20).until(lambda _: run(browser, folds) == [False, True, False])  # the event comes later


def test_without_scripts_everything_but_the_slider_is_there(browser, run_page):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, run_page)
        assert not browser.find_element("id", "heat-step").is_displayed()
        assert browser.find_element("css selector", ".maps rect").is_displayed()
        assert "Without scripts" in browser.find_element("css selector", "noscript").text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_watched_page_renews_itself_where_the_reader_was(browser, tmp_path):
    folder = write_run(tmp_path / "run")
    page = WatchedPage([folder], lambda version: watched_report([folder], version))
    server = Server(0, page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser.get_log("browser")
        browser.get(f"http://127.0.0.1:{server.port}/")
        run(browser, "document.querySelectorAll('details').forEach((fold) => { fold.open = true; });"
                     "scrollTo(0, 700); window.old = true;")  # fmt: skip
        recorder = Recorder(folder / "metrics.jsonl", enabled=True)
        recorder.write("train", step=7, values=train_values(7))
        recorder.close()
        page.renew()
        assert page.version == 2
        wait = WebDriverWait(browser, 20)
        wait.until(lambda _: run(browser, "return document.readyState === 'complete' && !window.old"))
        assert run(browser, "return document.querySelector('meta[name=version]').content") == "2"
        assert "step 7" in run(browser, "return document.getElementById('heat-label').textContent")
        assert run(browser, "return document.querySelectorAll('details:not([open])').length") == 0
        assert abs(run(browser, "return scrollY") - 700) < 5
        loaded = run(browser, "return performance.getEntriesByType('resource').map((e) => e.name)")
        assert all(name.startswith((f"http://127.0.0.1:{server.port}/", "data:")) for name in loaded)
        assert browser.get_log("browser") == []
    finally:
        server.shutdown()
        server.server_close()
    wait.until(lambda _: "has ended" in run(browser, "return document.getElementById('watch-state').textContent"))


def test_paper_has_all_folds_open(browser, run_page):
    show(browser, run_page)
    count = "return document.querySelectorAll('details:not([open])').length"
    folded = run(browser, count)
    run(browser, "dispatchEvent(new Event('beforeprint'))")
    assert folded > 0 == run(browser, count)
    run(browser, "dispatchEvent(new Event('afterprint'))")
    assert run(browser, count) == folded
