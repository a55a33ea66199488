"""Old module paths: the module at its new place, a warning, and nothing twice."""

import importlib
import subprocess
import sys

import pytest

from ase_dist.moved import MOVED, new_name

pytestmark = pytest.mark.single_gpu


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_gives_the_module_at_its_new_place(old):
    new = importlib.import_module(f"ase_dist.{MOVED[old]}")
    spec = new.__spec__
    sys.modules.pop(f"ase_dist.{old}", None)
    with pytest.warns(FutureWarning, match=rf"ase_dist\.{old} is now ase_dist\.{MOVED[old]}"):
        assert importlib.import_module(f"ase_dist.{old}") is new
    assert new.__spec__ is spec and new.__name__ == f"ase_dist.{MOVED[old]}"


def test_modules_below_an_old_package_too():
    assert new_name("ase_dist.data.scenes.render") == "ase_dist.scenes.render"
    assert new_name("ase_dist.inference.folder") == "ase_dist.deployment.predict_folder"
    assert new_name("ase_dist.data.scenery") is None and new_name("other.registry") is None
    assert new_name("ase_dist.training.loop.run") is None


def test_a_script_written_for_the_old_paths_runs():
    code = (
        "from ase_dist.training import runtime; from ase_dist.inference.folder import find_sources; "
        "from ase_dist.data.scenes import render; import ase_dist.training.runtime; "
        "from ase_dist.training.process.runtime import start; assert runtime.start is start; print('ran')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "ran\n", done.stderr
    assert "ase_dist.training.runtime is now ase_dist.training.process.runtime" in done.stderr


def test_the_package_itself_uses_no_old_path():
    code = "import warnings; warnings.simplefilter('error'); import ase_dist.commands.train, ase_dist.training.loop.run"
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            code.replace(
                "simplefilter('error')", "filterwarnings('error', category=FutureWarning, message='ase_dist')"
            ),
        ],
        check=True,
    )
