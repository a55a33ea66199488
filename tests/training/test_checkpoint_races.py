"""A run saves and deletes checkpoints while somebody reads them."""

import shutil

import pytest
import torch

from ase_dist.deployment.trained_model import choose_checkpoint
from ase_dist.errors import UserError
from ase_dist.training.record.run_folder import RunFolder
from ase_dist.training.state.checkpoint import CheckpointStore, open_whole, reader
from tests.training.conftest import groups, loads, save

pytestmark = pytest.mark.single_gpu


@pytest.fixture
def then(monkeypatch):
    """Lets something happen once between the check of a checkpoint and its first read."""
    verify, waiting = reader.verify, []

    def verify_then(path):
        found = verify(path)
        if waiting:
            waiting.pop()()
        return found

    monkeypatch.setattr(reader, "verify", verify_then)
    return waiting.append


def test_what_is_open_may_be_deleted(store):
    save(store, 1)
    checkpoint, problems = open_whole(store.folder / "step_1")
    shutil.rmtree(store.folder / "step_1")
    with checkpoint:
        for _, group in groups(1):
            assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in group.items())
    assert not problems


def test_one_that_is_deleted_after_its_check_is_passed_over(store, then, caplog):
    save(store, 1, 2)
    then(lambda: shutil.rmtree(store.folder / "step_2"))
    assert loads(store) == 1
    assert "step_2 is damaged and is passed over: it has just been deleted" in caplog.text


def test_the_newest_is_looked_up_again_where_the_run_has_replaced_all(tmp_path, then):
    """As retention does, between the list and the read."""
    folder = RunFolder(tmp_path)
    store = CheckpointStore(folder.checkpoints, keep=1, patience=0.2)
    save(store, 1)
    then(lambda: save(store, 2))
    with choose_checkpoint(tmp_path, "newest") as found:
        assert found.step == 2
    then(lambda: shutil.rmtree(folder.checkpoints / "step_2"))
    with pytest.raises(UserError, match=r"no such checkpoint; .* holds none at all"):
        choose_checkpoint(tmp_path, "newest")
