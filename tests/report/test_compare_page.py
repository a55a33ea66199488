"""The page that compares runs: curves over each other, gains, what differs, and runs that cannot be compared."""

import json
import shutil

import pytest

from ase_dist.commands import report
from ase_dist.errors import UserError
from ase_dist.report.comparison import color_of_run, name_runs
from ase_dist.report.page import write_comparison
from tests.report.conftest import Page, write_run

pytestmark = pytest.mark.single_gpu


def edit(folder, change):
    """Apply ``change`` to every line of the metrics; a line for which it gives None goes."""
    path = folder / "metrics.jsonl"
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines if line is not None))


def better(line):
    if line["kind"] == "eval":
        line["metrics"]["semseg"]["miou"] *= 1.25
        line["metrics"]["edge"]["bce"] *= 0.5
    return line


def replace(path, *pairs):
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def make_runs(folder):
    """A first run, and one that is better at two tasks, with other settings and ranks, at work."""
    first, second = write_run(folder / "runs/first"), write_run(folder / "runs/second")
    edit(second, better)
    edit(second, lambda line: None if line["step"] > 4 else line)
    edit(second, lambda line: {**line, "world": 4} if line["kind"] == "run" else line)
    replace(
        second / "config.yaml", ("gating: ase", "gating: naive"), ("lr: 0.004", "lr: 0.001"), ("seed: 7", "seed: 8")
    )
    replace(second / "env.json", ('"torch": "2.4"', '"torch": "2.5"'))
    return [first, second]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("compared"))


@pytest.fixture
def copies(folders, tmp_path):
    shutil.copytree(folders[0].parent, tmp_path / "runs")
    return [tmp_path / "runs" / folder.name for folder in folders]


def compared(folders, tmp_path, **options):
    return Page(write_comparison(folders, tmp_path / "page.html", **options).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory):
    return compared(folders, tmp_path_factory.mktemp("page"))


def test_results_have_gains_over_the_first_run_and_their_mean(page):
    rows = page.rows(page.root.one("section", id="results").one("table"))
    assert rows[0][1] == "Semantic segmentation mIoU % \u2191" and rows[0][-2].startswith("\u0394m")
    assert rows[1] == ["first reference", "16.00", "0.04000", "54.00", "0", "6"]
    # of the evaluation at step 3: 1.25 * 13 of 16, 0.035 of 0.04 (lower is better), 57 of 54
    gains = [1.5625, 12.5, -100 * 3 / 54]
    assert rows[2] == ["second", f"16.25+{gains[0]:.2f} %", f"0.03500+{gains[1]:.2f} %",
                       f"57.00\u2212{-gains[2]:.2f} %", f"+{sum(gains) / 3:.2f}", "3"]  # fmt: skip
    best = [cell.text for cell in page.root.one("section", id="results").all("td", class_="best")]
    assert best == ["54.00", f"16.25+{gains[0]:.2f} %", f"0.03500+{gains[1]:.2f} %"]


def test_every_chart_has_a_line_of_each_run_in_its_colour(page):
    charts = page.root.one("section", id="curves").all("figure", class_="chart")
    assert len(charts) == 3 + 4 + 4
    for chart in charts:
        lines = chart.one("svg").all("path", class_="line")
        assert [line.attributes["stroke"] for line in lines] == [color_of_run(0), color_of_run(1)]
        assert [name for name, _ in json.loads(chart.attributes["data-chart"])["lines"]] == ["first", "second"]
    legend = page.root.one("section", id="curves").one("ul", class_="legend")
    assert [item.text for item in legend.all("li")] == ["first", "second"]


def test_settings_worlds_and_versions_that_differ_are_listed_and_others_are_not(page):
    settings = page.rows(page.root.one("section", id="settings").one("table"))
    assert settings[1:] == [["seed", "7", "8"], ["model.moe.gating", "ase", "naive"], ["train.lr", "0.004", "0.001"]]
    places = page.rows(page.root.one("section", id="places").one("table"))
    assert places[1:] == [["ranks", "2", "4"], ["torch", "2.4", "2.5"]]
    note = page.root.one("section", id="results").one("ul", class_="notes").text
    assert note == "A step is not the same number of images in all runs, see their batch sizes and ranks."


def test_each_run_has_its_place_state_and_last_prediction(page, folders):
    rows = page.rows(page.root.one("section", id="runs").one("table"))
    assert rows[1][0] == f"first reference{folders[0]}" and rows[1][1:4] == ["done", "6 of 6", "scenes"]
    assert rows[2][2] == "4 of 6"
    shots = page.root.one("section", id="predictions").all("img")
    assert [shot.attributes["alt"] for shot in shots] == ["first, Step 6", "second, Step 6"]


@pytest.mark.parametrize("reference", ["second", "path"])
def test_another_run_is_the_reference_where_it_is_asked_for(folders, tmp_path, reference):
    page = compared(folders, tmp_path, reference=str(folders[1]) if reference == "path" else reference)
    rows = page.rows(page.root.one("section", id="results").one("table"))
    assert rows[2][0] == "second reference" and rows[2][-2] == "0"
    assert rows[1][1] == f"16.00\u2212{100 * 0.25 / 16.25:.2f} %"


def test_a_reference_may_be_anything_that_evaluate_takes(folders, tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps({"semseg": {"miou": 8.0}, "depth": {"rmse": 1.0}}))
    page = compared(folders, tmp_path, reference=str(tmp_path / "scores.json"))
    rows = page.rows(page.root.one("section", id="results").one("table"))
    assert rows[1][1:3] == ["16.00+100.00 %", "0.04000"] and rows[1][-2] == "+100.00"
    with pytest.raises(ValueError, match="--reference: got 'nothing', wanted"):
        compared(folders, tmp_path, reference="nothing")


def test_a_run_of_another_data_set_has_no_gain_and_a_sentence(copies, tmp_path):
    edit(copies[1], lambda line: {**line, "data": "nyud"} if line["kind"] == "run" else line)
    section = compared(copies, tmp_path).root.one("section", id="results")
    assert "second is of the data set nyud, first of scenes: its metrics are of other images" in section.text
    assert not section.all("small", class_="good") and not section.all("td", class_="best")


def test_tasks_that_one_run_alone_has_are_left_out_of_the_mean(copies, tmp_path):
    def without_edge(line):
        if line["kind"] == "eval":
            del line["metrics"]["edge"]
        return line

    edit(copies[1], without_edge)
    page = compared(copies, tmp_path)
    rows = page.rows(page.root.one("section", id="results").one("table"))
    assert rows[2][2] == "\u2013" and rows[2][-2] == f"\u2212{(100 * 3 / 54 - 1.5625) / 2:.2f}2 of 3 tasks"
    assert "first alone has Edges: \u0394m is over the tasks of both." in page.root.one("section", id="results").text


def test_other_validation_images_are_told(copies, tmp_path):
    replace(copies[1] / "config.yaml", ("val_images: 64", "val_images: 8"))
    text = compared(copies, tmp_path).root.one("section", id="results").text
    assert "not evaluated on the same images: data.scenes.val_images differ" in text


def test_a_damaged_run_and_a_folder_that_is_no_run_are_named_and_left_out(copies, tmp_path):
    (copies[1] / "metrics.jsonl").write_text("{}\nnonsense\n{}\n")
    (copies[1] / "summary.json").write_text("[")
    (tmp_path / "empty").mkdir()
    page = compared([*copies, tmp_path / "empty"], tmp_path)
    problems = page.root.one("aside", class_="problems").text
    for words in (
        "second: summary.json cannot be read",
        "metrics.jsonl: line 1 is not a record of a run",
        "second is left out: it has recorded no number",
        "empty is left out: it is no run's folder",
    ):
        assert words in problems
    assert len(page.rows(page.root.one("section", id="runs").one("table"))) == 2


def test_a_run_before_its_first_evaluation_is_on_the_page(copies, tmp_path):
    edit(copies[1], lambda line: None if line["kind"] == "eval" else line)
    (copies[1] / "summary.json").unlink()
    page = compared(copies, tmp_path)
    assert "second: not evaluated yet." in page.root.one("section", id="results").text
    assert page.rows(page.root.one("section", id="results").one("table"))[2][1:] == ["\u2013"] * 5
    losses = page.root.one("section", id="curves").all("figure", class_="chart")
    assert len(losses[-1].one("svg").all("path", class_="line")) == 2


def test_names_tell_runs_apart_and_a_run_that_is_given_twice_is_one(folders, copies, tmp_path):
    (a,) = {path.parents[1].name for path in folders}
    assert name_runs([folders[0], copies[0], copies[1]]) == [f"{a}/runs/first", f"{tmp_path.name}/runs/first", "second"]
    page = compared([folders[0], folders[0], folders[0] / ".." / "first"], tmp_path)
    assert len(page.rows(page.root.one("section", id="runs").one("table"))) == 2
    assert "All settings are the same" in page.root.one("section", id="settings").text


def test_the_command_wants_a_place_for_the_page_and_runs_that_are_there(folders, tmp_path, capsys):
    places = [str(folder) for folder in folders]
    assert report.main([*places, "--out", str(tmp_path / "page.html")]) == 0
    assert report.main(places) == 2
    assert report.main([*places, str(tmp_path / "nowhere"), "--out", str(tmp_path / "page.html")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("error: --out: wanted the file") and "nowhere' is not there" in told[1]
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(UserError, match="--out"):
        write_comparison(folders, tmp_path / "mine.html")
    with pytest.raises(UserError, match=r"there is no run to compare: .* is left out"):
        write_comparison([tmp_path], tmp_path / "page.html")
