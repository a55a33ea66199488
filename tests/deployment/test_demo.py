"""The demo's page in a headless Chromium: what it shows, and that nothing leaves this machine.

Skipped where Gradio (the extra demo) or Chromium with its driver is missing.
"""

import http.client
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from ase_dist.commands import demo as command
from ase_dist.deployment import demo
from ase_dist.errors import ExitCode
from tests.deployment.conftest import photo
from tests.training.tiny_runs import ROOT

pytestmark = pytest.mark.single_gpu
has_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="Gradio is missing (the extra demo)")
# Writes the address of every connection that is begun and every name that is looked up.
SPY = """
import os, socket
def note(what):
    with open(os.environ["SPY"], "a") as file:
        file.write(f"{what}\\n")
class Spy(socket.socket):
    def connect(self, address):
        note(address[0] if isinstance(address, tuple) else address)
        return super().connect(address)
    def connect_ex(self, address):
        note(address[0] if isinstance(address, tuple) else address)
        return super().connect_ex(address)
socket.socket = Spy
look_up = socket.getaddrinfo
def getaddrinfo(host, *others, **options):
    note(host.decode() if isinstance(host, bytes) else host)
    return look_up(host, *others, **options)
socket.getaddrinfo = getaddrinfo
"""
LOCAL = {"127.0.0.1", "localhost", "::1", "None"}


@pytest.fixture(scope="module")
def running(export, tmp_path_factory):
    """The command of the page in the documentation, spied upon: its port, its process, its folder."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "sitecustomize.py").write_text(SPY)
    (folder / "spied").touch()
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith("ase-dist demo "))
    words = [str(export) if word == "exports/scenes" else word for word in shlex.split(line)[1:]]
    (folder / "tmp").mkdir()
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path, "SPY": str(folder / "spied"), "TMPDIR": str(folder / "tmp")}
    process = subprocess.Popen(
        [sys.executable, "-m", "ase_dist", *words],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/ shows \S+; Ctrl-C ends it\n", line)
    assert found, line + process.stderr.read()
    yield int(found[1]), process, folder
    process.kill()
    process.communicate()


def ask(port, path="/", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer, answer.read().decode()


@has_gradio
def test_only_this_machine_is_answered(running):
    port, _, folder = running
    answer, _ = ask(port)
    assert answer.status == 200 and "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert ask(port, host=f"localhost:{port}")[0].status == 200
    for path in ("/", "/config", "/gradio_api/info"):
        assert ask(port, path, host=f"evil.example:{port}")[0].status == 400
    for path in (folder / "spied", ROOT / "README.md", "/etc/passwd"):
        assert ask(port, f"/gradio_api/file={path}")[0].status in (403, 404)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """As that of the pages of runs, which also notes what is asked for."""
    pages = pytest.importorskip("tests.report.test_browser")
    if pages.BROWSER is None or pages.DRIVER is None:
        pytest.skip("no Chromium or Chrome with its chromedriver here")
    driver = pages.start_browser(tmp_path_factory.mktemp("profile"), performance=True)
    yield driver
    driver.quit()


@has_gradio
def test_a_dropped_picture_is_predicted_and_the_experts_are_shown(running, browser, model, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    port = running[0]
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    browser.set_window_size(1300, 1700)
    browser.get(f"http://127.0.0.1:{port}/")
    wait = WebDriverWait(browser, 60)
    script = browser.execute_script
    wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#picture input[type=file]"))
    browser.find_element(By.CSS_SELECTOR, "#picture input[type=file]").send_keys(str(tmp_path / "photo.png"))

    def captions():
        return script("return [...document.querySelectorAll('#heat .caption-label')].map((e) => e.textContent.trim())")

    def sources(name):
        return script(f"return [...document.querySelectorAll('#{name} .grid-container img')].map((e) => e.src)")

    wait.until(lambda _: len(sources("predictions")) == len(sources("heat")) == len(model.tasks))
    wanted, _, shown = demo.prediction_pictures(model, Image.fromarray(photo()))
    assert captions() == [text for _, text in demo.heat_maps(model, shown, layer=None, expert=None)]
    for name, pictures in (("predictions", wanted), ("heat", demo.heat_maps(model, shown, layer=None, expert=None))):
        for source, (picture, _) in zip(sources(name), pictures, strict=True):
            assert np.array_equal(fetched(port, source), np.asarray(picture))
    assert script("return document.querySelector('#use img').naturalWidth") > 300

    for name, choice in (("layer", "2"), ("expert", "3 (shared)")):
        field = browser.find_element(By.CSS_SELECTOR, f"#{name} input")
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(choice, Keys.ENTER)
    chosen = [text for _, text in demo.heat_maps(model, shown, layer=1, expert=3)]
    wait.until(lambda _: captions() == chosen)
    if "SHOT" in os.environ:
        browser.save_screenshot(os.environ["SHOT"])

    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [entry["params"]["request"]["url"] for entry in asked if entry["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 10
    local = ("data", "blob", "chrome", "chrome-untrusted")  # the last two: the browser's own empty page before
    called = {urlsplit(url).netloc for url in urls if urlsplit(url).scheme not in local}
    assert called == {f"127.0.0.1:{port}"}
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def fetched(port, source):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", urlsplit(source).path)
    with Image.open(connection.getresponse()) as picture:
        return np.asarray(picture.convert("RGB"))


@has_gradio
def test_it_ends_in_one_line_has_called_nobody_and_keeps_no_picture(running):
    """After the others: what it did while they ran."""
    _, process, folder = running
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (0, "the demo has ended\n", "")
    assert time.monotonic() - began < 30
    called = set((folder / "spied").read_text().split("\n")) - {""}
    assert called <= LOCAL, called
    assert not [*(folder / "tmp").glob("*demo*")]


def test_without_gradio_there_is_a_sentence(export, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert command.main([str(export)]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert error.startswith("error: demo: Gradio cannot be imported (") and "pip install 'ase-dist[demo]'" in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_a_sentence(model):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="Address already in use"):
        demo.serve(model, title="x", host="127.0.0.1", port=taken.getsockname()[1], ready=print)
