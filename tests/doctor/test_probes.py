"""The probes of the doctor on broken machines: packages, processes, folders, limits, ranks."""

import io
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from ase_dist.doctor import examination, probes
from ase_dist.doctor.examination import Examination, run_probe
from ase_dist.doctor.findings import ProbeResult, Severity, Teller
from ase_dist.errors import ExitCode
from tests.training.tiny_runs import ROOT

pytestmark = pytest.mark.single_gpu
OPTIONS = {"output": "runs", "data": [], "timeout": 60.0}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts packages of any content before the real ones."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in probes.REQUIRED:
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "fairscale.py").unlink()
    (tmp_path / "fairscale" / "nn").mkdir(parents=True)
    for name in ("__init__", "nn/__init__", "nn/checkpoint"):
        (tmp_path / "fairscale" / f"{name}.py").write_text("")
    return lambda name, text: (tmp_path / f"{name}.py").write_text(text)


def test_packages_that_cannot_be_imported_are_a_finding_each(fake):
    fake("torch", "raise OSError('libcudart.so.13: cannot open shared object file')")
    fake("timm", "raise ImportError('no http://me:secret@host')")
    result = run_probe("libraries", OPTIONS)
    first, second = result.findings
    assert first.severity is second.severity is Severity.BROKEN
    assert first.sentence.startswith(
        "importing torch failed (OSError: libcudart.so.13: cannot open shared object file)"
    )
    assert "pip install --force-reinstall torch" in first.sentence
    assert "(ImportError: no http://***@host)" in second.sentence
    assert "seconds to import torchvision" in result.facts and "seconds to import fairscale" in result.facts


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("import os, signal; print('x', flush=True); os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV"),
        ("raise SystemExit(7)", "failed (SystemExit: 7)"),
    ],
)
def test_a_package_that_ends_the_process_is_a_finding_and_earlier_facts_are_kept(fake, text, how):
    fake("timm", text)
    result = run_probe("libraries", OPTIONS)
    (finding,) = result.findings
    assert finding.severity is Severity.BROKEN
    assert finding.sentence.startswith(f"importing timm {how}") and ": pip install" in finding.sentence
    assert "seconds to import deepspeed" in result.facts


def test_a_package_that_hangs_is_ended_with_its_processes(fake):
    fake("timm", "import subprocess, time; subprocess.Popen(['sleep', '61.25']); time.sleep(100)")
    began = time.monotonic()
    result = run_probe("libraries", {**OPTIONS, "timeout": 4.0})
    assert 4 <= time.monotonic() - began < 30
    (finding,) = result.findings
    assert finding.sentence.startswith("importing timm had not ended after 4 s: pip install")
    assert finding.severity is Severity.BROKEN and "seconds to import deepspeed" in result.facts

    def left():
        processes = psutil.process_iter(["cmdline", "status"])
        return [p for p in processes if "61.25" in (p.info["cmdline"] or ()) and p.info["status"] != "zombie"]

    deadline = time.monotonic() + 5
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left()


def told_by(probe, **options):
    stream = io.StringIO()
    probe(Teller(stream), {**OPTIONS, **options})
    result = ProbeResult(probe.__name__)
    result.read(stream.getvalue())
    return result


def test_versions_that_are_missing_or_too_old(monkeypatch):
    found = {"torch": "2.3.0", "deepspeed": None}
    monkeypatch.setattr("ase_dist.versions.version_of", lambda name: found.get(name, "999"))
    findings = told_by(probes.versions).findings
    old, missing = sorted(findings, key=lambda finding: finding.severity is Severity.BROKEN)
    assert re.fullmatch(r"torch is 2\.3\.0 and this version needs >=[\d.]+: pip install 'torch>=[\d.]+'", old.sentence)
    assert missing.severity is Severity.BROKEN and missing.sentence.startswith("deepspeed is not installed")


def test_a_checkout_that_is_not_installed_has_the_bounds_of_its_project(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    bounds = probes._requirements(Teller(io.StringIO()))
    assert bounds["torch"].startswith(">=2") and {"deepspeed", "pydantic", "rich"} <= bounds.keys()


def test_shared_memory_that_is_missing_read_only_or_small(tmp_path, monkeypatch):
    def sentence(folder):
        stream = io.StringIO()
        probes._shared_memory(Teller(stream), folder)
        result = ProbeResult("machine")
        result.read(stream.getvalue())
        return [finding.sentence for finding in result.findings]

    assert sentence(tmp_path / "shm")[0].startswith(f"there is no {tmp_path / 'shm'}, over which loader processes")
    assert "cannot be written" in sentence(Path("/proc/self"))[0]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    assert "has 67 MB free" in sentence(tmp_path)[0] and "--shm-size=1g" in sentence(tmp_path)[0]


def test_folders_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/self/triton")
    said = "\n".join(finding.sentence for finding in told_by(probes.folders, output=tmp_path / "file/runs").findings)
    assert "the cache of triton, /proc/self/triton, cannot be written to (" in said and "set TRITON_CACHE_DIR" in said
    assert f"output: cannot write to {tmp_path / 'file/runs'} ({tmp_path / 'file'} is a file)" in said
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**8))
    said = "\n".join(finding.sentence for finding in told_by(probes.folders, output=tmp_path / "runs").findings)
    assert f"output: 0.1 GB are free at {tmp_path / 'runs'}" in said and "exit code 74" in said


def test_a_user_without_a_home_is_a_finding_and_no_end():
    nobody = ("unshare", "--user", "--map-user=54321", "--map-group=54321")
    if (
        shutil.which("unshare") is None
        or subprocess.run([*nobody, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("user namespaces are not allowed here")
    program = (
        "from ase_dist.doctor.examination import run_probe\n"
        "for finding in run_probe('folders', {'output': 'runs', 'data': [], 'timeout': 60}).findings:\n"
        "    print(finding.severity.value, finding.sentence)\n"
    )
    done = subprocess.run(
        [*nobody, sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning looking at the cache of data sets failed (the user id 54321 has no home folder" in done.stdout


def test_few_files_and_half_a_launcher():
    program = (
        "import resource\nfrom ase_dist.doctor.examination import run_probe\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "for finding in run_probe('machine', {'timeout': 60}).findings:\n    print(finding.sentence)\n"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "LOCAL_RANK"))}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT,
        env={**variables, "RANK": "0", "WORLD_SIZE": "2"},
    )  # fmt: skip
    assert "a process may open 200 files" in done.stdout
    assert "RANK or WORLD_SIZE is set and LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not" in done.stdout


def test_a_system_that_starts_no_process_is_a_finding(monkeypatch):
    monkeypatch.setattr(examination.sys, "executable", "/nowhere/python")
    found = Examination([run_probe("machine", OPTIONS)])
    assert found.exit_code == ExitCode.USAGE and "no process can be started" in found.as_text()
