"""What holds for every page: it is whole, loads nothing, lets nothing in, stays small; and the command."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ase_dist.commands import report
from ase_dist.errors import UserError
from ase_dist.report.page import write_report
from tests.report.conftest import Page, write_picture, write_run, write_study

pytestmark = pytest.mark.single_gpu

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "launch" / "report.py"
EVIL = "<img src=x onerror=alert(1)>\"'</script></title></style><script>alert(2)</script>&amp;"
LIMIT = 8_000_000


@pytest.fixture(params=[write_run, write_study], ids=["run", "study"])
def folder(request, tmp_path):
    return request.param(tmp_path / "folder")


def sha256(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_policy_allows_nothing_but_what_is_in_the_page(folder, read_page):
    page = read_page(write_report(folder))
    (policy,) = [m.attributes["content"] for m in page.root.all("meta") if "http-equiv" in m.attributes]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    (script,) = [element for element in page.root.all("script") if "type" not in element.attributes]
    assert rules == {"default-src": "'none'", "img-src": "data:", "style-src": sha256(page.root.one("style").raw),
                     "script-src": sha256(script.raw), "base-uri": "'none'", "form-action": "'none'"}  # fmt: skip


def test_nothing_is_loaded_and_no_style_or_handler_is_inline(folder, read_page):
    page = read_page(write_report(folder))
    for element in page.root.all():
        assert not {name for name in element.attributes if name.startswith("on") or name == "style"}
        assert (element.attributes.get("src") or "data:").startswith("data:")
        target = element.attributes.get("href") or "#"
        assert target == "data:," or re.match(r"#|[\w./%-]+$", target)
    assert "url(" not in page.root.one("style").raw and "@import" not in page.root.one("style").raw


def test_names_are_one_of_a_kind_and_links_lead_somewhere(folder, read_page):
    page = read_page(write_report(folder))
    ids = [element.attributes["id"] for element in page.root.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    targets = {link.attributes["href"][1:] for link in page.root.all("a") if link.attributes["href"].startswith("#")}
    assert targets and targets <= set(ids)
    assert all(image.attributes.get("alt") for image in page.root.all("img") if image.attributes.get("id") is None)


def poison(value):
    """Every text and every key of a tree with markup in it."""
    if isinstance(value, dict):
        return {(key if key in KEPT else key + EVIL): poison(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poison(item) for item in value]
    return value + EVIL if isinstance(value, str) else value


KEPT = {"kind", "step", "tasks", "data", "metrics", "trivial", "losses", "name", "variants", "runs", "seeds", "missing"}


def poison_folder(folder):
    for path in [
        *folder.rglob("*.json"),
        *folder.rglob("*.jsonl"),
        *folder.rglob("config.yaml"),
        *folder.rglob("*.log"),
    ]:
        if path.suffix == ".json":
            path.write_text(json.dumps(poison(json.loads(path.read_text()))))
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps({**poison(line), "kind": line["kind"]}) + "\n" for line in lines))
        elif path.suffix == ".yaml":
            path.write_text(yaml.safe_dump(poison(yaml.safe_load(path.read_text()))))
        else:
            path.write_text(f"{path.read_text()}2026-01-02 03:04:05,678 [rank 0] ERROR {EVIL}\n{EVIL}\n")
    write_picture(folder / "predictions" / (EVIL.replace("/", "_") + ".png"))
    write_picture(folder / "plots" / (EVIL.replace("/", "_") + ".png"))


@pytest.mark.parametrize("make", [write_run, write_study], ids=["run", "study"])
def test_markup_in_names_logs_and_values_stays_text(tmp_path, make, read_page):
    clean = read_page(write_report(make(tmp_path / "clean")))
    folder = make(tmp_path / EVIL.replace("/", "_"))
    poison_folder(folder)
    page = read_page(write_report(folder))
    assert EVIL.split("</", 1)[0] in page.root.text
    scripts = [[element.attributes for element in each.root.all("script")] for each in (page, clean)]
    assert scripts[0] in (scripts[1], scripts[1][-1:])  # the data of heat maps may be gone, nothing else is there
    assert not [
        image for image in page.root.all("img") if not (image.attributes.get("src") or "data:").startswith("data:")
    ]
    assert not [e for e in page.root.all() for name in e.attributes if name.startswith("on")]
    assert len(page.root.all("title")) == len(page.root.all("style")) == 1


@pytest.mark.parametrize("make", [write_run, write_study], ids=["run", "study"])
def test_control_characters_in_names_logs_and_values_are_not_in_the_page(tmp_path, make, read_page):
    """Escape sequences, marks that reverse the direction of writing, and a name that is no UTF-8."""
    odd = "odd\x1b[2Jname\u202e\x9b\x00"
    folder = make(tmp_path / "made").rename(tmp_path / os.fsdecode("odd\x1b[2J\u202e".encode() + b"\xff"))
    for path in folder.rglob("rank_0.log"):
        path.write_text(f"2026-01-02 03:04:05,678 [rank 0] ERROR {odd}\n\tat {odd}\n")
    for path in folder.rglob("summary.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "exit": odd, "step": 99}))
    for path in folder.rglob("study.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "title": odd}))
    write_picture(folder / "predictions" / "pic\x1b[2J.png")
    write_picture(folder / "plots" / os.fsdecode(b"plot\xff.png"))
    out = write_report(folder, tmp_path / "page.html")
    source = out.read_text(encoding="utf-8")
    assert not set(source) & {chr(i) for i in (*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x202E)}
    page = read_page(out)
    assert "odd\ufffd[2J" in page.root.one("h1").text
    if make is write_run:
        (notice,) = page.root.one("ul", class_="log").all("pre")
        assert notice.raw == "odd\ufffd[2Jname\ufffd\ufffd\ufffd\n\tat odd\ufffd[2Jname\ufffd\ufffd\ufffd"


def test_a_large_run_stays_below_the_limit_and_says_what_is_left_out(run_folder, read_page):
    """128 experts in 12 layers, 400 records, 30 fine-grained grids: what a long run leaves."""
    load = [[[0.01 * (i % 97) for i in range(128)] for _ in range(5)] for _ in range(12)]
    tasks = ["semseg", "human_parts", "saliency", "edge", "normals"]
    with (run_folder / "metrics.jsonl").open("w") as file:
        file.write(
            json.dumps({"kind": "run", "step": 0, "tasks": tasks, "data": "scenes", "shared_experts": [127]}) + "\n"
        )
        for step in range(400):
            experts = {"expert_load": load, "mean_gates": load} if step % 8 == 0 else {}
            line = {
                "kind": "train",
                "step": step,
                "loss": 1 / (step + 1),
                "losses": dict.fromkeys(tasks, 1.0),
                **experts,
            }
            file.write(json.dumps(line) + "\n")
    for step in range(30):
        write_picture(run_folder / "predictions" / f"step_{step}.png", size=(560, 400), grain=1, seed=step)
    out = write_report(run_folder)
    assert 3_000_000 < out.stat().st_size < LIMIT
    page = read_page(out)
    assert (
        "left out" in page.root.one("section", id="predictions").text
        or "are shown" in page.root.one("section", id="predictions").text
    )
    assert page.root.one("section", id="predictions").all("img")[0].attributes["alt"] == "Step 29"


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def command():
    """The main function of the command."""
    return lambda *arguments: report.main([str(argument) for argument in arguments])


def test_the_command_writes_the_page_where_it_is_told(run_folder, tmp_path, command, caplog):
    caplog.set_level("INFO")
    assert command(run_folder, "--out", tmp_path / "new" / "page.html") == 0
    assert "page.html, 0." in caplog.text and "MB" in caplog.text
    assert Page((tmp_path / "new" / "page.html").read_text()).root.one("h1").text == "first_run"
    assert not (run_folder / "report.html").exists()


@pytest.mark.parametrize("kind", ["missing", "other", "file", "unwritable"])
def test_what_cannot_be_reported_is_one_sentence_and_code_2(run_folder, tmp_path, command, capsys, kind):
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("x")
    wanted = [run_folder, "--out", tmp_path / "file" / "page.html"] if kind == "unwritable" else [tmp_path / kind]
    assert command(*wanted) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and str(tmp_path) in said.err


def test_help_comes_without_torch(tmp_path):
    code = (
        f"import runpy, sys; sys.argv = ['report.py', '--help']; runpy.run_path({str(COMMAND)!r}, run_name='__main__')"
    )
    blocked = f"import sys; sys.modules['torch'] = sys.modules['matplotlib'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and "RUN_OR_STUDY" in done.stdout and "--out" in done.stdout


def test_a_page_replaces_a_page_and_nothing_else(run_folder):
    page = write_report(run_folder)
    assert write_report(run_folder) == page
    page.write_text("<p>my own</p>")
    with pytest.raises(UserError, match=r"^--out: '\S*report.html' would be replaced"):
        write_report(run_folder)
    assert page.read_text() == "<p>my own</p>"
