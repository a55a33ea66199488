"""The page of a run: what it shows, and that every missing or damaged file leaves a page."""

import json
import os
import shutil

import pytest

from ase_dist.report.page import write_report
from tests.report.conftest import LAYERS, STEPS, TASKS, Page, write_run

pytestmark = pytest.mark.single_gpu


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(write_report(write_run(tmp_path_factory.mktemp("runs") / "first_run")).read_text(encoding="utf-8"))


def test_the_head_says_what_it_is_and_how_it_ended(page):
    assert page.root.one("h1").text == "first_run" and page.root.one("title").text == "first_run - Training run"
    assert page.root.one("p", class_="state").text.startswith("done ")
    facts = {pair.one("dt").text: pair.one("dd").text for pair in page.root.one("dl", class_="facts").all("div")}
    assert facts["Steps"] == "6 of 6" and facts["Trained"] == "1.33 M of 3.77 M parameters"
    assert facts["Training time"].startswith("0:01:01") and facts["Ranks"] == "2 cpu on node7"


def test_the_results_beside_the_trivial_predictor(page):
    rows = page.rows(page.root.one("table", class_="results"))
    assert rows[1] == ["Semantic segmentation", "mIoU % \u2191", "12.00", "10.00", "16.00beats trivial", "16.00", "6"]
    assert rows[2][:6] == ["Edges", "BCE \u2193", "0.09000", "0.1000", "0.04000beats trivial", "0.04000"]
    assert rows[3][4] == "54.00below trivial"
    assert rows[4][0].startswith("Mean gain")


def test_a_chart_for_everything_that_was_recorded(page):
    names = [figure.one("span", class_="name").text for figure in page.root.all("figure", class_="chart")]
    titles = ["Semantic segmentation", "Edges", "Surface normals"]
    assert names == [*titles, "Mean gain", "Weighted sum of losses", *titles, "Learning rate", "Speed", "Memory",
                     "Router's auxiliary loss", *titles, "Pairs of tasks in conflict", "Mean cosine",
                     "Mean cosine by layer"]  # fmt: skip
    for figure in page.root.all("figure", class_="chart"):
        assert figure.one("svg").all("path", class_="line")
        assert json.loads(figure.attributes["data-chart"])["x"][0] >= 0


def test_the_slider_has_a_place_for_every_record(page):
    slider = page.root.one("input", id="heat-step")
    assert (slider.attributes["min"], slider.attributes["max"]) == ("0", str(len(STEPS) - 1))
    assert len(page.root.one("div", class_="maps").all("figure")) == LAYERS
    assert page.root.one("output", id="heat-label").text == "step 6, 2 epochs done"
    assert [option.text for option in page.root.all("option")] == ["Activation frequency", "Mean gate"]


def test_the_pictures_are_in_the_page_the_latest_first(page):
    pictures = page.root.one("section", id="predictions").all("img")
    assert [picture.attributes["alt"] for picture in pictures] == ["Step 6", "Step 0", "Step 3"]
    assert all(picture.attributes["src"].startswith("data:image/webp;base64,") for picture in pictures)


def test_the_ranks_and_their_images(page):
    rows = page.rows(page.root.one("section", id="ranks").all("table")[0])
    assert rows[1][1:5] == ["done", "1", "0", "0"]
    assert "Each rank trained on 24 images up to step 6." in page.root.one("section", id="ranks").text  # 4 a step
    assert [row[0] for row in rows[1:]] == ["Rank 0", "Rank 1"]


def test_settings_that_differ_are_marked(page):
    marked = {row.one("th").text for row in page.root.one("section", id="settings").all("tr", class_="differs")}
    assert {"seed", "tasks", "train.max_steps", "output"} <= marked and "train.weight_decay" not in marked


def test_the_matrix_of_conflicts_is_the_last_one(page):
    figure = page.root.one("figure", class_="matrix-frame")
    assert "step 4" in figure.text
    assert [t.text for t in figure.all("text", class_="number")].count("+0.10") == len(TASKS) * (len(TASKS) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Missing and damaged


FILES = ("config.yaml", "ds_config.json", "env.json", "summary.json", "metrics.jsonl", "rank_0.log", "predictions")


@pytest.mark.parametrize("name", FILES)
def test_without_a_file_there_is_still_a_page(run_folder, read_page, name):
    path = run_folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = read_page(write_report(run_folder))
    assert not page.root.all("aside")
    assert page.root.one("h1").text == "first_run"


@pytest.mark.parametrize("name", FILES)
def test_of_a_file_alone_there_is_a_page_where_it_is_a_runs(run_folder, tmp_path, read_page, name):
    alone = tmp_path / "alone"
    alone.mkdir()
    path = run_folder / name
    shutil.copytree(path, alone / name) if path.is_dir() else shutil.copy(path, alone)
    if name in ("ds_config.json", "rank_0.log", "predictions"):
        with pytest.raises(ValueError, match="neither a run's folder nor a study's"):
            write_report(alone)
    else:
        assert read_page(write_report(alone)).root.one("section", id="files")


@pytest.mark.parametrize(
    ("name", "content"),
    [*(("summary.json", content) for content in (b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000)),
     ("env.json", b"{"), ("config.yaml", b"[1]"), ("config.yaml", b"\xff\xfe")],
)  # fmt: skip
def test_a_damaged_file_is_named_on_the_page(run_folder, read_page, name, content):
    (run_folder / name).write_bytes(content)
    page = read_page(write_report(run_folder))
    assert name in page.root.one("aside", class_="problems").text
    assert page.root.one("section", id="curves")


@pytest.mark.parametrize(
    "summary",
    [
        {"exit": None, "step": "6", "metrics": 3, "parameters": [], "total_steps": "x", "best_step": None},
        {"step": 6, "parameters": {"all": {"total": None}}, "train_seconds": "long", "world_size": [], "exit": {}},
    ],
)
def test_odd_values_in_a_summary_leave_a_page(run_folder, read_page, summary):
    (run_folder / "summary.json").write_text(json.dumps(summary))
    (run_folder / "env.json").write_text(
        json.dumps({"command": 3, "packages": [], "world_size": {}, "memory_bytes": "x"})
    )
    (run_folder / "config.yaml").write_text("train: 3\ndata: [1]\nmodel: {moe: {enabled: true}}\n")
    assert read_page(write_report(run_folder)).root.one("table", class_="results")


def test_a_killed_run_shows_what_it_had_and_says_so(run_folder, read_page):
    (run_folder / "summary.json").unlink()
    (run_folder / "rank_0.beat").write_text('{"doing": "forward of step 7", "host": "node7"}')
    os.utime(run_folder / "rank_0.beat", (0, 0))
    lines = (run_folder / "metrics.jsonl").read_bytes()
    (run_folder / "metrics.jsonl").write_bytes(lines[:-40])  # its last line is half written
    page = read_page(write_report(run_folder))
    assert (
        "killed Rank 0 (last seen at 'forward of step 7') left without a word"
        in page.root.one("p", class_="state").text
    )
    assert page.root.one("table", class_="results") and not page.root.all("aside")


def test_metrics_damaged_in_the_middle_are_said_and_the_summary_stands_in(run_folder, read_page):
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    (run_folder / "metrics.jsonl").write_text("\n".join([lines[0], "broken", *lines[2:]]) + "\n")
    page = read_page(write_report(run_folder))
    assert "line 2 is not a record" in page.root.one("aside", class_="problems").text
    assert page.rows(page.root.one("table", class_="results"))[1][4] == "16.00beats trivial"
    assert not page.root.all("section", id="experts")


def test_records_of_odd_forms_leave_a_page(run_folder, read_page):
    odd = [{"kind": "run", "step": 9, "tasks": {"a": 1}, "world": "x"}, {"kind": "train", "step": 9, "losses": [1]},
           {"kind": "train", "step": 10, "losses": {"semseg": {}}, "loss": "x", "expert_load": [[1]], "lr": []},
           {"kind": "eval", "step": 10, "metrics": [], "trivial": 3}, {"kind": "conflict", "step": 10, "cosines": [1]},
           {"kind": ["odd"], "step": -1}]  # fmt: skip
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in odd)
    assert read_page(write_report(run_folder)).root.one("table", class_="results")


def test_a_run_without_experts_has_no_maps(run_folder, read_page):
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("expert_load", "mean_gates", "shared_gate")
    plain = [
        {key: value for key, value in line.items() if key not in keys} for line in lines if line["kind"] != "conflict"
    ]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plain))
    page = read_page(write_report(run_folder))
    assert not page.root.all("section", id="experts") and not page.root.all("section", id="conflict")
    assert page.root.one("section", id="curves")


def test_a_seed_of_a_study_is_named_with_its_variant(run_folder, tmp_path, read_page):
    seed = tmp_path / "ase_16_3_1_4" / "seed_2"
    shutil.copytree(run_folder, seed)
    assert read_page(write_report(seed)).root.one("h1").text == "ase_16_3_1_4, seed_2"
