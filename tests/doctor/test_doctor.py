"""``ase-dist doctor`` on this machine, and the page that tells of it."""

import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from ase_dist.commands import doctor
from ase_dist.doctor import examination
from ase_dist.doctor.examination import TITLES, run_probe
from ase_dist.doctor.findings import Finding, ProbeResult, Severity
from ase_dist.errors import ExitCode
from tests.training.tiny_runs import ROOT

pytestmark = pytest.mark.single_gpu
PAGE = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
SECRET = "hunter2-is-my-password"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The JSON of the page's own command, run in an empty folder among variables that nobody must see."""
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "photographs").mkdir()
    (line,) = (line for line in LINES if "--json" in line)
    words = shlex.split(line.partition(" > ")[0])
    secrets = dict.fromkeys(("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "NCCL_TOKEN"), SECRET)
    done = subprocess.run(
        [sys.executable, "-m", "ase_dist", *words[1:]], cwd=folder, capture_output=True, text=True, timeout=300,
        check=False, env={**os.environ, **secrets, "https_proxy": f"http://me:{SECRET}@proxy", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert SECRET not in done.stdout
    assert not (folder / "runs").exists()
    return folder, json.loads(done.stdout)


def test_the_facts_are_those_of_this_machine(told):
    folder, found = told
    facts = {name: probe["facts"] for name, probe in found["probes"].items()}
    assert list(facts) == list(TITLES)
    assert facts["machine"]["python"] == platform.python_version()
    assert facts["machine"]["memory"] == psutil.virtual_memory().total
    assert facts["machine"]["cores, affinity"] == len(os.sched_getaffinity(0))
    assert facts["machine"]["open files, allowed"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for name in ("torchvision", "timm", "deepspeed", "numpy"):
        assert facts["versions"][name] == metadata.version(name)
    assert facts["folders"]["output folder, disk"] == shutil.disk_usage(folder).total
    assert facts["folders"]["output folder"] == str(folder / "runs/next")
    assert set(facts["network"]["interfaces"]) <= set(psutil.net_if_addrs())
    assert facts["launchers"]["git"] == shutil.which("git")
    assert facts["libraries"]["accelerator"] in ("cpu", "cuda")


def test_two_real_ranks_have_added_up(told):
    said = told[1]["probes"]["collective"]["facts"]["gloo, two ranks"]
    assert re.fullmatch(r"met in [\d.]+ s, 4 MiB added up in [\d.]+ ms \([\d.]+ GB/s\)", said)


def test_what_is_wrong_here_is_a_sentence(told):
    _, found = told
    sentences = [finding["sentence"] for finding in found["findings"]]
    assert any(re.search(r"data: \S*/photographs is empty; unpack", sentence) for sentence in sentences)
    assert any("MLFLOW_TRACKING_PASSWORD is set" in sentence for sentence in sentences)
    assert found["exit_code"] == 0 and "broken" not in {finding["severity"] for finding in found["findings"]}


def test_the_text_has_all_of_it(told, monkeypatch, capsys):
    _, found = told
    kept = {name: ProbeResult(name, facts=probe["facts"]) for name, probe in found["probes"].items()}
    kept["machine"].findings.append(Finding(Severity.NOTE, "the moon is full; wait"))
    monkeypatch.setattr(examination, "run_probe", lambda name, options: kept[name])
    (line,) = (line for line in LINES if "--json" not in line)
    assert doctor.main(shlex.split(line)[2:]) == ExitCode.DONE
    text = capsys.readouterr().out
    for result in kept.values():
        assert all(name in text for name in result.facts)
    assert "note: the moon is full; wait\nRuns work here (warnings: 0, notes: 1).\n" in text
    kept["devices"].findings.append(Finding(Severity.BROKEN, "there is no torch; get one"))
    assert doctor.main([]) == ExitCode.USAGE
    assert capsys.readouterr().out.endswith(
        "broken: there is no torch; get one\nnote: the moon is full; wait\n"
        "No run works here until what is broken is mended.\n"
    )


@pytest.mark.multi_gpu
def test_ranks_that_cannot_meet_are_a_warning(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    (finding,) = run_probe("collective", {"timeout": 60.0}).findings
    assert finding.severity is Severity.WARNING
    assert finding.sentence.startswith("adding up a tensor of two ranks over gloo failed (rank ")
    (finding,) = run_probe("network", {"timeout": 60.0}).findings
    assert finding.sentence.startswith("GLOO_SOCKET_IFNAME names 'nosuch0', which is no interface of this machine")


@pytest.mark.parametrize("seconds", ["0", "nan", "1e9"])
def test_a_deadline_that_is_none_is_refused(seconds, capsys):
    assert doctor.main([f"--timeout={seconds}"]) == ExitCode.USAGE
    assert capsys.readouterr().err.startswith("error: --timeout: got ")


def test_the_form_for_bug_reports_asks_for_it_first():
    tool = shutil.which("check-jsonschema", path=str(Path(sys.executable).parent))
    form = ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml"
    assert form.read_text().split("attributes:")[1].lstrip().startswith("label: ase-dist doctor\n")
    if tool is not None:
        done = subprocess.run(
            [tool, "--builtin-schema", "vendor.github-issue-forms", str(form)], capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout
