"""``report --watch``: one page, for this machine alone, made anew when records change."""

import http.client
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ase_dist.commands import report
from ase_dist.errors import ExitCode
from ase_dist.report.page import watched_report
from ase_dist.report.watch import WatchedPage
from ase_dist.training.record.metrics import Recorder
from tests.report.conftest import train_values, write_run, write_study
from tests.training.tiny_runs import ROOT

pytestmark = pytest.mark.single_gpu


def ask(port, path="/", *, host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=host is not None)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    return answer, answer.read().decode()


def add_step(folder, step):
    recorder = Recorder(folder / "metrics.jsonl", enabled=True)
    recorder.write("train", step=step, values=train_values(step))
    recorder.close()


@pytest.fixture(scope="module")
def watching(tmp_path_factory):
    """A run's folder, and the command that watches it: the process and its port."""
    folder = write_run(tmp_path_factory.mktemp("watched") / "run")
    page = (ROOT / "docs" / "monitors.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith("ase-dist report "))
    words = [str(folder) if word == "runs/scenes" else word for word in line.split()[1:]]
    process = subprocess.Popen(
        [sys.executable, "-m", "ase_dist", *words], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    line = process.stdout.readline()
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/ shows the page as the run goes on; Ctrl-C ends it\n", line)
    assert found, line + process.stderr.read()
    yield folder, process, int(found[1])
    process.kill()
    process.communicate()


def test_the_page_is_served_and_nothing_is_written(watching, read_page, tmp_path):
    folder, _, port = watching
    answer, page = ask(port)
    assert answer.status == 200 and answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store" and answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Access-Control-Allow-Origin"] is None
    assert "connect-src &#39;self&#39;" in page and page.count("<script>") == 2
    assert ask(port, method="HEAD")[1] == ""
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1.evil.example:{port}",
                                  "localhost:1", ""])  # fmt: skip
def test_a_site_whose_name_leads_here_is_refused(watching, host):
    port = watching[2]
    answer, body = ask(port, host=host.format(port=port))
    assert answer.status == 403 and "first_run" not in body and "mIoU" not in body


@pytest.mark.parametrize("host", ["localhost:{port}", "127.0.0.1:{port}"])
def test_this_machine_may_ask(watching, host):
    port = watching[2]
    assert ask(port, "/version", host=host.format(port=port))[0].status == 200


@pytest.mark.parametrize("path", ["/metrics.jsonl", "/../run/env.json", "/%2e%2e/run/env.json", "/report.html",
                                  "/config.yaml", "/predictions/step_000003.png", "/?x"])  # fmt: skip
def test_no_file_is_served(watching, path):
    assert ask(watching[2], path)[0].status == 404


def test_other_methods_are_refused(watching):
    assert {ask(watching[2], method=method)[0].status for method in ("POST", "PUT", "DELETE", "OPTIONS")} == {501}


def test_it_listens_on_the_loopback_interface_alone(watching):
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    addresses = [words[1] for words in listening if words[1].endswith(f":{watching[2]:04X}") and words[3] == "0A"]
    assert addresses == [f"0100007F:{watching[2]:04X}"]


def test_new_records_make_a_new_page(watching):
    folder, _, port = watching
    before = int(ask(port, "/version")[1])
    assert "step 8" not in ask(port)[1]
    add_step(folder, 8)
    deadline = time.monotonic() + 60
    while int(ask(port, "/version")[1]) == before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "step 8" in ask(port)[1]


def test_ctrl_c_ends_it_in_one_line(watching):
    _, process, _ = watching
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (0, "the page is no longer served\n", "")


def test_pages_are_made_only_of_what_has_changed_and_a_damaged_record_leaves_the_last(tmp_path, caplog):
    folder = write_run(tmp_path / "run")
    made = []

    def build(version):
        made.append(version)
        if (folder / "summary.json").stat().st_size < 3:
            raise ValueError("half a summary")
        return f"page {version}"

    page = WatchedPage([folder], build)
    page.renew()
    assert made == [1]
    (folder / "rank_0.log").write_text("a line")  # as at every moment of a run
    page.renew()
    assert made == [1]
    (folder / "summary.json").write_text("{")
    with caplog.at_level(logging.WARNING, "ase_dist"):
        page.renew()
        page.renew()
    assert (made, page.version, page.page) == ([1, 2, 2], 1, b"page 1")
    assert [record.getMessage() for record in caplog.records] == [
        "the page stays as it was (ValueError: half a summary)"
    ]
    (folder / "summary.json").write_text("{}  ")
    page.renew()
    assert (page.version, page.page) == (2, b"page 2")


def test_a_study_and_runs_compared_are_watched_too(tmp_path):
    study = write_study(tmp_path / "study")
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    assert "A toy study" in watched_report([study], 1)
    assert "2 runs compared" in watched_report(runs, 1)
    page = WatchedPage([study], lambda version: watched_report([study], version))
    add_step(study / "runs" / "ase" / "seed_0", 9)
    page.renew()
    assert page.version == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "page.html"], "--watch: it writes nothing, and got --out"),
        (["--port", "70000"], "--port: cannot listen on port 70000 of 127.0.0.1 ("),
    ],
)
def test_options_that_do_not_fit_are_a_sentence(options, words, run_folder, capsys):
    assert report.main([str(run_folder), "--watch", *options]) == ExitCode.USAGE
    assert words in capsys.readouterr().err


def test_a_port_in_use_is_a_sentence(run_folder, capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert report.main([str(run_folder), "--watch", "--port", str(taken.getsockname()[1])]) == ExitCode.USAGE
    assert "Address already in use" in capsys.readouterr().err
