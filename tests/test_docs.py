"""The pages of docs/: every file, function, module and name that they point to is there."""

import ast
import importlib
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
WALK = re.findall(r"`([\w/]+\.py): ([\w.]+)`", (ROOT / "docs" / "walk.md").read_text())
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()

pytestmark = pytest.mark.single_gpu


def definitions(path):
    """Every function and class of a file by its qualified name."""
    found, todo = set(), [("", ast.parse(path.read_text()))]
    while todo:
        prefix, node = todo.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + child.name)
                todo.append((f"{prefix}{child.name}.", child))
    return found


@pytest.mark.parametrize(("path", "name"), WALK)
def test_every_station_of_a_walk_is_there(path, name):
    assert name in definitions(ROOT / path)


def test_a_walk_has_at_most_a_dozen_stations():
    walks = re.split(r"^## |^Resumed", (ROOT / "docs" / "walk.md").read_text(), flags=re.MULTILINE)[1:]
    assert len(walks) == 3
    assert all(1 < len(re.findall(r"^\d+\. ", walk, flags=re.MULTILINE)) <= 12 for walk in walks)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(ase_dist(?:\.\w+)+)`", GLOSSARY))))
def test_every_module_of_the_glossary_is_there(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([A-Z]\w+)(?:\.\w+)?`", GLOSSARY))))
def test_every_class_of_the_glossary_is_there(name):
    files = (ROOT / "ase_dist").rglob("*.py")
    assert any(re.search(rf"^class {name}\b|^{name}\b.* = ", path.read_text(), re.MULTILINE) for path in files)


def program(name):
    """A program of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawings_are_those_that_their_program_makes():
    drawings = program("drawings")
    made = {f"{name}.svg": draw() for name, draw in drawings.DRAWINGS.items()}
    assert made == {path.name: path.read_text(encoding="utf-8") for path in drawings.FOLDER.iterdir()}


def test_tables_of_figures_are_those_of_the_benchmarks_files():
    """``python docs/figures.py`` makes them anew; every table is on a page, and every file has a table."""
    figures = program("figures")
    texts = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    assert [name for name, text in texts.items() if figures.renewed(text) != text] == []
    assert sorted(re.findall(r"<!-- figures: (\w+) -->", "".join(texts.values()))) == sorted(figures.TABLES)
    files = {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    assert files == {file for _, file in figures.TABLES.values()}


def test_a_changed_figure_is_seen():
    figures = program("figures")
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert figures.renewed(text.replace("| 1009 |", "| 1010 |")) == text != text.replace("| 1009 |", "| 1010 |")


def test_pictures_are_made_of_a_run(tmp_path):
    pictures = program("pictures")
    (tmp_path / "predictions").mkdir()
    for step, color in ((0, "red"), (20, "blue")):
        Image.new("RGB", (3000, 600), color).save(tmp_path / f"predictions/step_{step:06}.png")
    (tmp_path / "report.html").write_text("<body style='background: #00ff00'></body>")
    names = ["predictions", *["report"] * any(map(shutil.which, pictures.BROWSERS))]
    pictures.main(tmp_path, tmp_path, names)
    made = {name: Image.open(tmp_path / f"{name}.jpg") for name in names}
    assert made["predictions"].size == (1500, 300) and made["predictions"].getpixel((9, 9))[2] > 250
    if "report" in made:
        assert made["report"].width == 915 and made["report"].getpixel((450, 600))[1] > 250
    assert {path.stem for path in pictures.IMAGES.glob("*.jpg")} == set(pictures.PICTURES)
