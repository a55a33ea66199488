"""The page of a study: means and spreads, what is best, what is missing."""

import json
import statistics

import pytest

from ase_dist.report.page import write_report
from tests.report.conftest import variant_values

pytestmark = pytest.mark.single_gpu


def change(folder, edit):
    tree = json.loads((folder / "results.json").read_text())
    edit(tree)
    (folder / "results.json").write_text(json.dumps(tree))


def table(page):
    return page.root.one("table", class_="study")


def test_means_and_spreads_over_seeds(study_folder, read_page):
    page = read_page(write_report(study_folder))
    heads, stl, naive, ase = page.rows(table(page))
    assert [head.split(" mIoU")[0].split(" BCE")[0] for head in heads[:3]] == [
        "Variant",
        "Semantic segmentation",
        "Edges",
    ]
    spread = statistics.stdev([20.0, 21.0])
    assert stl[1] == f"20.50\u00b1 {spread:.2f}" and naive[1].startswith("22.50") and ase[1] == "24.00"
    assert stl[2].startswith("0.0500") and stl[3].startswith("+0.00") and naive[3].startswith("+1.00")


def test_the_best_among_whole_variants_is_marked_in_the_columns_direction(study_folder, read_page):
    page = read_page(write_report(study_folder))
    best = [[i for i, cell in enumerate(row.children) if "best" in (cell.attributes.get("class") or "")]
            for row in table(page).one("tbody").all("tr")]  # fmt: skip
    stl, naive, ase = best
    assert {1, 2, 3, 4} <= set(naive)  # mIoU, BCE, Delta_m and trained parameters; "ase" lacks a seed
    assert 1 not in stl and set(stl) & {5, 6, 7, 8, 9, 10}  # speed
    assert not set(ase) & {1, 2, 3}


def test_missing_seeds_are_said_plainly(study_folder, read_page):
    page = read_page(write_report(study_folder))
    assert "5 of 6 seeds done" in page.root.one("p", class_="state").text
    marks = [mark.text for mark in table(page).all("span", class_="mark")]
    assert marks == ["reference", "1 of 2 seeds"]
    assert "Not done: ase/seed_1." in page.root.one("section", id="table").text


def test_a_fold_for_every_variant_with_what_its_run_left(study_folder, read_page):
    write_report(study_folder / "runs" / "naive" / "seed_0")
    page = read_page(write_report(study_folder))
    folds = page.root.one("section", id="variants").children
    stl, naive, ase = [fold for fold in folds if fold.tag == "details"]
    assert not stl.all("img") and "(its folder is not there)" in stl.text
    assert [image.attributes["alt"] for image in naive.all("img")] == ["Naive shared, runs/naive/seed_0: Step 6"]
    assert len(ase.all("figure", class_="chart")) >= 5
    assert naive.one("a").attributes["href"] == "runs/naive/seed_0/report.html"
    assert [link.attributes["href"] for link in table(page).all("a")] == [
        f"#{fold.attributes['id']}" for fold in (stl, naive, ase)
    ]


def test_links_lead_from_wherever_the_page_is(study_folder, tmp_path, read_page):
    write_report(study_folder / "runs" / "ase" / "seed_0")
    out = tmp_path / "pages" / "study page.html"
    link = read_page(write_report(study_folder, out)).root.one("section", id="variants").one("a").attributes["href"]
    assert (out.parent / link).resolve() == study_folder / "runs" / "ase" / "seed_0" / "report.html"


def test_conflict_over_training_has_a_line_per_variant(study_folder, read_page):
    page = read_page(write_report(study_folder))
    first, second = page.root.one("section", id="charts").all("figure", class_="chart")
    assert [item.text for item in first.one("ul", class_="legend").all("li")] == ["Naive shared", "Adaptive shared"]
    hover = json.loads(first.attributes["data-chart"])["lines"]
    assert hover[0] == ["Naive shared", [[1, "55.00"], [2, "55.00"], [3, "55.00"]]]
    assert len(first.all("path", class_="band")) == 1 and not second.all("path", class_="band")


def test_separate_runs_of_one_variant_are_all_shown(study_folder, read_page):
    from tests.report.conftest import write_run

    runs = [f"runs/stl/seed_{seed}/{task}" for task in ("semseg", "edge") for seed in (0, 1)]
    for run in runs:
        path = write_run(study_folder / run) / "metrics.jsonl"
        text = path.read_text().replace('"tasks":["semseg","edge","normals"]', f'"tasks":["{run.split("/")[-1]}"]', 1)
        path.write_text(text)
    change(study_folder, lambda tree: tree["variants"][0].update(runs=runs))
    page = read_page(write_report(study_folder))
    images = page.root.one("details", id="variant-0").all("img")
    assert [image.attributes["alt"].split(": ")[0] for image in images] == [
        "Single task, runs/stl/seed_0/semseg", "Single task, runs/stl/seed_0/edge"]  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda tree: tree.update(variants=[]), "There are no results yet"),
        (lambda tree: tree.update(variants=[{"name": "a"}]), "no seed is done"),
        (lambda tree: tree.update(variants=[{"name": 3}]), "results.json cannot be read: at variants.0.name"),
        (lambda tree: tree["variants"][0].update(metrics={"semseg": {"miou": [None, 1.0]}}), "1.00"),
        (lambda tree: tree["variants"][0].update(delta_m=None, parameters=None, flops=None), "Single task"),
        (lambda tree: tree["variants"][1].update(conflict={"steps": [1, 2], "cosine": [[1.0]]}), "Naive shared"),
        (lambda tree: tree["variants"][1].update(metrics={"<odd>": {"m": [1.0]}}), "<odd>"),
    ],
)
def test_odd_results_leave_a_page_that_says_so(study_folder, read_page, edit, sentence):
    change(study_folder, edit)
    assert sentence in read_page(write_report(study_folder)).root.text


@pytest.mark.parametrize("name", ["study.json", "results.json"])
@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff"])
def test_one_of_the_two_files_missing_or_damaged(study_folder, read_page, name, content):
    (study_folder / name).unlink()
    if content is not None:
        (study_folder / name).write_bytes(content)
    page = read_page(write_report(study_folder))
    assert bool(page.root.all("aside", class_="problems")) == (content is not None)
    assert page.root.one("section", id="plots").all("img")


def test_seeds_may_be_left_to_the_values(study_folder, read_page):
    """A results.json without the names of seeds counts its values."""
    change(
        study_folder,
        lambda tree: tree.update(variants=[{k: v for k, v in variant_values("ase").items() if k != "seeds"}]),
    )
    assert "1 of 2 seeds" in read_page(write_report(study_folder)).root.text
