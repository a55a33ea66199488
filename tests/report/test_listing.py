"""Files, checkpoints and commands."""

import shlex
import subprocess

import pytest

from ase_dist.read_config import load_settings
from ase_dist.report.listing import MOST, commands, list_checkpoints, list_files
from ase_dist.training.record.run_folder import RunFolder
from ase_dist.training.state.checkpoint import CheckpointStore
from tests.training.conftest import save, truncate

pytestmark = pytest.mark.single_gpu


def test_files_and_folders_with_their_sizes(run_folder):
    (run_folder / ".hidden").write_text("x")
    (run_folder / "own.txt").write_text("x" * 1500)
    entries, left_out = list_files(run_folder)
    found = {entry.name: entry for entry in entries}
    assert left_out == 0 and ".hidden" not in found
    assert (found["own.txt"].size, found["own.txt"].meaning) == ("1.5 kB", "")
    assert found["rank_1.log"].meaning == "the log of that rank"
    assert found["predictions/"].size.startswith("3 files, ")


def test_many_files_are_not_all_listed(tmp_path):
    for i in range(MOST + 5):
        (tmp_path / f"f{i:03}").touch()
    entries, left_out = list_files(tmp_path)
    assert (len(entries), left_out) == (MOST, 5)


def test_checkpoints_newest_first_damaged_ones_named(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=3, patience=0.2)
    save(store, 10, 20, 30)
    truncate(next((tmp_path / "checkpoints" / "step_20").glob("*.safetensors")))
    found = list_checkpoints(tmp_path / "checkpoints")
    assert [(each.name, each.is_whole) for each in found] == [("step_30", True), ("step_20", False), ("step_10", True)]
    assert [each.role for each in found] == ["latest", "", ""]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_the_command_without_what_a_launcher_adds(run_folder):
    started = {"command": ["launch/train.py", "--local_rank=0", "output=a b"], "world_size": 1}
    (_, given), (_, again) = commands(RunFolder(run_folder), started)
    assert given == "python launch/train.py 'output=a b'"
    words = shlex.split(again.replace("\\\n", ""))
    assert load_settings(words[words.index("--config") + 1]).seed == 7  # the run's
    assert words[-1] == f"output={run_folder}_again"


def test_a_long_command_goes_on_below_and_is_the_same_to_a_shell(tmp_path):
    words = ["launch/train.py", *(f"some.setting={i}" for i in range(20)), "output=it's here"]
    ((_, given),) = commands(RunFolder(tmp_path), {"command": words})
    assert given.count("\n") > 2 and max(map(len, given.splitlines())) < 110
    said = subprocess.run(["sh", "-c", f"printf '%s\\n' {given}"], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["python", *words]


def test_several_ranks_need_a_launcher(run_folder):
    given = commands(RunFolder(run_folder), {"command": ["launch/train.py"], "world_size": 4})[0][1]
    assert given == "torchrun --nproc_per_node 4 launch/train.py"


@pytest.mark.parametrize("odd", [{}, {"command": None}, {"command": "x"}, {"command": [], "world_size": "many"}])
def test_what_is_not_recorded_is_not_repeated(tmp_path, odd):
    assert commands(RunFolder(tmp_path), odd) == []
