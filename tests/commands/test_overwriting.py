"""No command replaces what it did not write; each goes over its own output again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from ase_dist.commands import evaluate, make_scenes, plan, pretrain_backbone, study
from ase_dist.errors import UserError
from ase_dist.evaluation.tables import Report
from ase_dist.overwriting import contains, is_own_png, png_mark, refuse_foreign
from ase_dist.tasks import PASCAL_TASKS

MINE = b"the user's own\n"


def test_what_is_not_there_or_own_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "own").write_bytes(b"x mark y")
    refuse_foreign([tmp_path / "own", tmp_path / "new"], is_own=contains(b"mark"), option="--out")


@pytest.mark.parametrize("kind", ["other", "empty", "link", "dangling", "folder"])
def test_anything_else_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "own").write_bytes(b"mark")
    place = tmp_path / kind
    {
        "other": lambda: place.write_bytes(MINE),
        "empty": place.touch,
        "link": lambda: place.symlink_to("own"),
        "dangling": lambda: place.symlink_to("nowhere"),
        "folder": place.mkdir,
    }[kind]()
    with pytest.raises(UserError, match=rf"^--out: '\S*{kind}' would be replaced .* name another place"):
        refuse_foreign([place], is_own=contains(b"mark"), option="--out")
    with pytest.raises(UserError, match=rf"^--out: '\S*{kind}' \(and 1 more\) would"):
        refuse_foreign([tmp_path / "own", place, place], is_own=contains(b"mark"), option="--out")


def test_a_picture_says_whether_it_is_own(tmp_path: Path) -> None:
    picture = Image.new("RGB", (3, 3))
    picture.save(tmp_path / "own.png", pnginfo=png_mark())
    picture.save(tmp_path / "other.png")
    assert is_own_png(tmp_path / "own.png") and not is_own_png(tmp_path / "other.png")


REFUSALS: dict[str, tuple[Callable[[Sequence[str]], int], list[str], str]] = {
    "evaluate md": (evaluate.main, ["no_run", "--out", "OUT"], "metrics.md"),
    "evaluate tex": (evaluate.main, ["no_run", "--out", "OUT"], "metrics.tex"),
    "evaluate json": (evaluate.main, ["no_run", "--out", "OUT"], "metrics.json"),
    "evaluate default": (evaluate.main, ["OUT"], "evaluation/metrics.md"),
    "plan json": (plan.main, ["--json", "OUT/plan.json"], "plan.json"),
    "plan plot": (plan.main, ["--plot", "OUT/plot.png"], "plot.png"),
    "make_scenes": (make_scenes.main, ["--contact-sheet", "OUT/holiday.png"], "holiday.png"),
    "study": (study.main, ["topk", "--out", "OUT"], "results.md"),
    "study facts": (study.main, ["topk", "--out", "OUT", "--tables-only"], "study.json"),
    "study plots": (study.main, ["topk", "--out", "OUT"], "plots/mine.png"),
    "pretrain weights": (pretrain_backbone.main, ["--out", "OUT/b.safetensors"], "b.safetensors"),
    "pretrain card": (pretrain_backbone.main, ["--out", "OUT/b.safetensors"], "b.json"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_file_of_the_user_s_own_is_refused_before_any_work(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    main, arguments, name = REFUSALS[case]
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_bytes(MINE)
    with caplog.at_level(logging.INFO):
        assert main([argument.replace("OUT", str(out)) for argument in arguments]) == 2
    said = capsys.readouterr().err + caplog.text
    assert f"{name}' would be replaced" in said and "Traceback" not in said
    assert [path.read_bytes() for path in out.rglob("*") if path.is_file()] == [MINE]


def test_an_evaluation_replaces_its_own_report_until_someone_changes_it(tmp_path: Path) -> None:
    from ase_dist.deployment.evaluate_model import refuse_foreign_report, write_report

    report = Report("x", {}, (PASCAL_TASKS["semseg"],), {"semseg": {"miou": 50.0}})
    write_report(report, tmp_path)
    write_report(report, tmp_path)
    tree = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.md").write_bytes(MINE)
    with pytest.raises(UserError, match=r"metrics\.md' would be replaced"):
        refuse_foreign_report(tmp_path)
    del tree["files"]  # as earlier versions wrote it
    (tmp_path / "metrics.json").write_text(json.dumps(tree))
    write_report(report, tmp_path)


def test_a_contact_sheet_is_drawn_again(tmp_path: Path) -> None:
    arguments = ["--contact-sheet", str(tmp_path / "sheet.png"), "--scenes", "0", "--size", "32"]
    assert make_scenes.main(arguments) == make_scenes.main(arguments) == 0


def test_a_plan_is_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--world", "2", "--ep", "1,2", "--zero", "0"]
    arguments += ["--json", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "plot.png")]
    assert plan.main(arguments) == plan.main(arguments) == 0
