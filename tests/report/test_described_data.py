"""A data set of one's own on the page of its run: a table of tasks and files, and the classes with their colours."""

import pytest
import yaml

from ase_dist.read_config import build_settings, to_yaml
from ase_dist.report.page import write_report
from ase_dist.report.settings import read_settings
from tests.report.conftest import Page, write_run

pytestmark = pytest.mark.single_gpu

DATA = """
name: garden
images: "images/{}.jpg"
splits: {train: [images/a, images/b], val: lists/val.txt}
tasks:
  semseg:
    kind: classes
    files: "labels/{}.png"
    title: Plants
    classes: {soil: [96, 64, 32], rose: "#e0205a"}
    id_map: {7: soil, 8: rose, 9: ignore}
  depth: {kind: depth, files: ["depth/{}.png", "depth/{}.npy"], unit: mm, loss_weight: 2}
"""


def page_of(folder, description):
    write_run(folder)
    settings = build_settings({"data": {"description": yaml.safe_load(description)}, "output": str(folder)})
    (folder / "config.yaml").write_text(to_yaml(settings))
    return folder


def test_a_described_data_set_is_a_table(tmp_path):
    page = Page(write_report(page_of(tmp_path / "run", DATA)).read_text(encoding="utf-8"))
    section = page.root.one("section", id="data")
    facts = {pair.one("dt").text: pair.one("dd").text for pair in section.one("dl").all("div")}
    assert facts == {"images": "images/{}.jpg", "train": "images/a, images/b", "val": "lists/val.txt"}
    assert page.rows(section.one("table"))[1:] == [
        ["Plants semseg", "classes", "labels/{}.png", "mIoU %", "1", "id_map 7: soil, 8: rose, 9: ignore"],
        ["Depth depth", "depth", "depth/{}.png, depth/{}.npy", "RMSE m", "2", "unit mm"],
    ]
    classes = section.one("ul", class_="legend")
    assert [item.text for item in classes.all("li")] == ["0 soil", "1 rose"]
    assert [rect.attributes["fill"] for rect in classes.all("rect")] == ["#604020", "#e0205a"]
    (row,) = [row for row in page.rows(page.root.one("section", id="settings")) if row[:1] == ["data.description"]]
    assert row[1] == "garden: semseg, depth; see the section Data set changed"


def test_a_data_set_without_a_description_or_of_another_version_has_no_table(tmp_path):
    page = Page(write_report(write_run(tmp_path / "plain")).read_text(encoding="utf-8"))
    assert not page.root.all("section", id="data")
    folder = page_of(tmp_path / "other", DATA)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("kind: classes", "kind: flow"))
    assert read_settings(config.read_text())
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert not page.root.all("section", id="data")
    (row,) = [row for row in page.rows(page.root.one("section", id="settings")) if row[:1] == ["data.description"]]
    assert "flow" in row[1]
