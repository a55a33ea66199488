"""The wheel, built from this checkout and used where there is none: its commands, its data, a run."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import ase_dist

pytestmark = pytest.mark.single_gpu

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "ase_dist", "ds_configs", "launch", "tests", "benchmarks", "docs")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
SMALL = ("data.scenes.train_images=2", "data.scenes.val_images=1", "data.scenes.size=32", "train.max_steps=1",
         "train.batch_size=1", "train.warmup_steps=0", "eval.at_start=false", "monitor.tensorboard=false")  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without network from a copy, so that nothing is left in the checkout."""
    if not any(importlib.metadata.distributions(name="pip")):  # finding the module would change distutils as well
        pytest.skip("no pip in this environment")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=LEFT_OUT)
        else:
            shutil.copy(ROOT / name, source / name)
    checked([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source], cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds the installed package and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    checked([*PIP, "install", "--no-deps", "--no-index", "--target", folder, wheel], cwd=folder)
    return folder


@pytest.fixture
def python(installed, tmp_path):
    """Python in an empty folder. Without ``site`` (-S) no .pth file brings an editable checkout onto the path."""
    paths = [str(installed), *{sysconfig.get_path(kind) for kind in ("purelib", "platlib")}]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {**kept, "PYTHONPATH": os.pathsep.join(paths)}
    return lambda *words: checked([sys.executable, "-S", *words], cwd=tmp_path, env=environment)


def checked(words, **options):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, timeout=400, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"ase_dist", f"ase_dist-{ase_dist.__version__}.dist-info"}
    package = {path for path in (ROOT / "ase_dist").glob("**/*") if path.is_file() and "__pycache__" not in path.parts}
    wanted = {str(path.relative_to(ROOT)) for path in package}
    wanted |= {f"ase_dist/ds_configs/{path.name}" for path in (ROOT / "ds_configs").iterdir()}
    assert {name for name in names if name.startswith("ase_dist/")} == wanted
    assert {"ase_dist/py.typed", "ase_dist/baselines.yaml", "ase_dist/__main__.py"} < wanted


def test_the_package_comes_from_the_wheel(python, installed):
    said = python("-c", "import ase_dist, importlib.metadata as m; print(ase_dist.__file__, m.version('ase-dist'))")
    assert said.split() == [str(installed / "ase_dist" / "__init__.py"), ase_dist.__version__]


def test_the_commands_answer(python, installed):
    assert python(installed / "bin" / "ase-dist").startswith("usage: ase-dist COMMAND ")
    assert "prepare_data" in python("-m", "ase_dist", "--help")
    assert "model:" in python("-m", "ase_dist", "train", "--print-config")
    assert "ase_dist train --deepspeed_config z2" in python("-m", "ase_dist", "train", "--help")


def test_a_run_and_its_page(python, tmp_path):
    """The default config with the shipped backbone and a shipped JSON of DeepSpeed's, on fewer and smaller scenes."""
    python("-m", "ase_dist", "train", "--deepspeed_config", "z2", *SMALL, "data.root=scenes", "output=run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["exit"] == "done" and summary["step"] == 1
    given = json.loads((tmp_path / "run" / "ds_config.json").read_text())
    assert given["zero_optimization"]["stage"] == 2
    python("-m", "ase_dist", "report", "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "python -m ase_dist train" in page and "__main__.py" not in page
