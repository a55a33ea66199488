"""The names that settings choose from: all of them resolve, a new one is a setting, a wrong one is one sentence."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ase_dist
from ase_dist.data.folder import FolderDataset
from ase_dist.data.readers import reader_of
from ase_dist.read_config import load_settings
from ase_dist.registries import GATINGS, HEADS, Registry
from ase_dist.tasks import DATA_SETS, DataSet, packable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

pytestmark = pytest.mark.single_gpu

ROOT = Path(__file__).parents[1]
PACKAGE = Path(ase_dist.__file__).parent
PLACE = re.compile(r"ase_dist(\.\w+)+(:\w+)?")


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
    assert set(packable()) == {"pascal_context", "nyud", "nyuv2_13", "cityscapes"}
    monkeypatch.setitem(DATA_SETS, "odd", DataSet({}, reader=dict))
    with pytest.raises(ValueError, match="the reader of the data set"):
        reader_of("odd")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported_by_name(source: str) -> set[str]:
    """Strings that name a module of the package, or something in one ("module:attribute"), in a module's source."""
    modules = {module_name(path) for path in PACKAGE.rglob("*.py")}
    strings = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    places = {text for text in strings if isinstance(text, str) and PLACE.fullmatch(text)}
    return {place for place in places if ":" in place or place in modules}


def test_imports_by_name_are_declared_and_their_targets_exist():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ase_dist"][
        "string_imports"
    ]
    found = {module_name(path): imported_by_name(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    modules = {name: {place.partition(":")[0] for place in places} for name, places in found.items() if places}
    assert modules == {name: set(targets) for name, targets in declared.items()}
    for place in set().union(*found.values()):
        module, _, attribute = place.partition(":")
        target = importlib.import_module(module)
        assert not attribute or hasattr(target, attribute), place


def test_imports_by_name_are_found():
    source = 'TABLE = {"a": "ase_dist.new.room:Thing"}\nimport_module("ase_dist.tasks")\nx = "ase_dist.json"\n'
    assert imported_by_name(source) == {"ase_dist.new.room:Thing", "ase_dist.tasks"}
