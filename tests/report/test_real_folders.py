"""A page of what training and studies leave today, not of what the other tests make up."""

import json
import os
import platform
from unittest import mock

import pytest

from ase_dist.report.page import write_report
from ase_dist.study.run import run_study
from ase_dist.study.runner import Slots
from ase_dist.training.loop import trainer
from tests.study.conftest import in_process, toy  # noqa: F401  (fixtures)
from tests.training.tiny_runs import said, tiny_run

pytestmark = pytest.mark.single_gpu


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def test_a_run_shows_in_every_section(scenes, folder, read_page):
    evaluated = ("eval.every=3", "eval.at_start=true", "eval.pictures=1")
    code = tiny_run(scenes, folder, "eval.gradient_conflict_every=3", *evaluated)
    page = read_page(write_report(folder))
    assert code == 0 and page.root.one("p", class_="state").text.startswith("done")
    sections = [section.attributes["id"] for section in page.root.all("section")]
    assert sections == [
        "results",
        "predictions",
        "curves",
        "experts",
        "conflict",
        "ranks",
        "settings",
        "environment",
        "files",
    ]
    assert len(page.rows(page.root.one("table", class_="results"))) == 1 + 5 + 1
    assert not page.root.all("aside")
    ranks = page.rows(page.root.one("section", id="ranks").all("table")[0])
    assert ranks[1][:3] == ["Rank 0", "done", "1"]
    frames = json.loads(page.root.one("script", id="heat-data").raw)
    assert [label.split(",")[0] for label in frames["labels"]] == [f"step {step}" for step in range(1, 7)]
    assert len(page.root.one("section", id="predictions").all("img")) == 3
    assert page.root.one("section", id="files").one("h3").text == "Checkpoints"


def test_a_failed_run_is_told_with_its_reason_and_forgiven_when_it_goes_on(scenes, folder, read_page):
    def head():
        return read_page(write_report(folder)).root.one("p", class_="state").text

    with mock.patch.object(trainer, "evaluate", side_effect=RuntimeError("no memory left")):
        sentence = said(scenes, folder)
    assert sentence == "RuntimeError: no memory left"
    failed, reason = "failed The run ended with an error: RuntimeError: no memory left;", "the last record is of step 6"
    assert head().startswith(failed) and reason in head()
    assert tiny_run(scenes, folder) == 0 and head().startswith("done ")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [(line["kind"], line.get("attempt"), line.get("exit")) for line in lines if line["kind"] in ("run", "end")]
    assert kept == [("run", 1, None), ("end", None, "failed"), ("run", 2, None), ("end", None, "done")]
    assert lines[0]["ranks"] == [{"host": platform.node(), "pid": os.getpid()}]


def test_a_study_shows_its_variants_and_what_is_missing(toy, in_process, tmp_path, read_page):  # noqa: F811
    out, name = tmp_path / "study", "ase_16_3_1_4_pair"
    options = {"data": "toy", "seeds": 1, "out": out, "slots": Slots(), "overrides": ["eval.pictures=1"]}
    run_study("naive_vs_ase", only=[name], **options)
    page = read_page(write_report(out))
    assert not page.root.all("aside") and page.root.one("p", class_="state").text.startswith("complete")
    rows = page.rows(page.root.one("table", class_="study"))
    assert [row[0].split(" reference")[0] for row in rows[1:]] == [
        "LoRA-MoE 16/4/0/4, 2 tasks",
        "ASE 16/3/1/4, 2 tasks",
    ]
    assert len(page.root.one("section", id="plots").all("img")) == len(list((out / "plots").glob("*.png")))
    assert len(page.root.one("section", id="charts").all("figure", class_="chart")) == 3
    assert [
        len(fold.all("img")) for fold in page.root.one("section", id="variants").all("details") if fold.all("img")
    ] == [1, 1]
    run_study("naive_vs_ase", train=False, **{**options, "seeds": 2})
    page = read_page(write_report(out))
    assert "naive_16_3_1_4_all/seed_0" in page.root.one("section", id="table").text
