"""The names that settings choose from: all of them resolve, a new one is a setting, a wrong one is one sentence."""

import subprocess
import sys

import pytest

from ase_dist.config import load_settings
from ase_dist.data.folder import FolderDataset
from ase_dist.data.readers import reader_of
from ase_dist.registries import GATINGS, HEADS, Registry
from ase_dist.tasks import DATA_SETS, DataSet, packable

pytestmark = pytest.mark.single_gpu


@pytest.mark.parametrize("table", [HEADS, GATINGS], ids=["heads", "gatings"])
def test_everything_listed_can_be_imported(table):
    assert len(table) == len(list(table)) > 2
    assert all(callable(table[name]) for name in table)


def test_a_place_is_imported_once_and_only_when_it_is_asked_for():
    table = Registry({"late": "json:dumps", "never": "no_such_module:x"})
    assert "late" in table and "never" in table and "other" not in table
    assert table["late"] is table["late"] and table["late"]([1]) == "[1]"
    with pytest.raises(KeyError):
        table["other"]


@pytest.mark.parametrize(("key", "table"), [("model.head", HEADS), ("model.moe.gating", GATINGS)])
def test_what_is_added_is_a_setting_and_gone_when_it_is_taken_out(key, table):
    def chosen():
        tree = load_settings(None, [f"{key}=mine"]).model_dump()
        for part in key.split("."):
            tree = tree[part]
        return tree

    with pytest.raises(ValueError, match=rf"^{key}: got 'mine', wanted one of"):
        chosen()
    table["mine"] = object()
    try:
        assert chosen() == "mine"
    finally:
        del table["mine"]
    with pytest.raises(ValueError, match="got 'mine'"):
        chosen()


def test_the_nearest_name_is_told():
    with pytest.raises(ValueError, match=r"^model\.head: got 'pup_liner', .*, did you mean 'pup_linear'\?$"):
        load_settings(None, ["model.head=pup_liner"])


def test_names_are_known_without_torch():
    code = "import sys, ase_dist.registries; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_data_set_has_a_reader_and_those_that_are_generated_are_not_packed(monkeypatch):
    readers = {name: reader_of(name) for name in DATA_SETS}
    assert all(issubclass(reader, FolderDataset) for reader in readers.values())
    assert set(packable()) == {"pascal_context", "nyud"}
    monkeypatch.setitem(DATA_SETS, "odd", DataSet({}, reader=dict))
    with pytest.raises(ValueError, match=r"DATA_SETS\['odd'\]\.reader"):
        reader_of("odd")
