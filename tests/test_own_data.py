"""docs/own_data.md followed to the letter, in a folder with nothing but photographs and labels."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ase_dist import description, load
from ase_dist.read_config import load_settings, recorded_settings
from ase_dist.training.state.checkpoint import open_checkpoint
from tests.training.conftest import start_world

pytestmark = pytest.mark.single_gpu

PAGE = (Path(__file__).parents[1] / "docs" / "own_data.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
(FILE,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
SMALL = (
    "data.size=32",
    "model.backbone=vit_tiny_patch16_224",
    "model.backbone_args={embed_dim: 24, depth: 2, num_heads: 2}",
    "model.pretrained=none",
    "model.head=linear",
    "model.moe.num_experts=4",
    "model.moe.k=2",
    "train.max_steps=2",
    "train.batch_size=4",
    "train.log_every=1",
    "train.warmup_steps=0",
    "eval.batch_size=4",
    "eval.pictures=1",
    "monitor.tensorboard=false",
)
ROSE, ROSES = [224, 32, 90], 4


def write_garden(root, *, images=20, shape=(48, 64)):
    """What the page says: photographs, maps of twelve classes with 255 in them, millimetres with 0 in them."""
    for folder in ("images", "labels", "depth"):
        (root / folder).mkdir(parents=True)
    y, x = np.mgrid[: shape[0], : shape[1]]
    for i in range(images):
        ids = ((x // 16 + y // 16 * 4 + i) % 12).astype(np.uint8)
        noise = np.random.default_rng(i).integers(0, 40, (*shape, 3))
        name = f"bed {i + 1:02}"
        Image.fromarray((ids[..., None] * (17, 7, 11) + noise).astype(np.uint8)).save(root / f"images/{name}.jpg")
        millimetres = (500 + 300 * ids.astype(np.int32) + x).astype(np.uint16)
        ids[:2], millimetres[:2] = 255, 0
        Image.fromarray(ids).save(root / f"labels/{name}.png")
        Image.fromarray(millimetres).save(root / f"depth/{name}.png")


TOYS = """
from ase_dist.data.folder import FolderDataset
from ase_dist.tasks import DataSet, Task
TOYS = DataSet({"depth": Task("depth", "Far away", "depth", 1, 1.0, "rmse", "RMSE m", False)}, reader=FolderDataset)
"""


def write_toys(folder):
    (folder / "my_data.py").write_text(TOYS)
    for place in ("images", "depth", "lists"):
        (folder / "toys" / place).mkdir(parents=True)
    for i in range(5):
        Image.fromarray(np.full((40, 40, 3), 20 * i, np.uint8)).save(folder / f"toys/images/t{i}.png")
        np.save(folder / f"toys/depth/t{i}.npy", np.full((40, 40), 1.0 + i, np.float32))
    (folder / "toys/lists/train.txt").write_text("t0\nt1\nt2\nt3\n")
    (folder / "toys/lists/val.txt").write_text("t4\n")


def follow(rank, folder):
    """Every command of the page in its order, short runs; then the training command again, with what may change."""
    from ase_dist.commands.main import main
    from ase_dist.training.process import runtime
    from ase_dist.training.record import plots

    runtime.stop = lambda: None  # DeepSpeed joins a process group once in a process
    plots.draw_all = lambda folder: None  # which takes longer than such a run
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    sys.path[:] = [place for place in sys.path if place not in ("", str(folder))]  # as an installed command has it
    codes = []
    for line in COMMANDS:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "ase_dist"]
        is_training = words[3] == "train"
        codes.append(main([*words[3:], *(SMALL if is_training else ())]))
        if "--init" in words:
            (folder / "first.yaml").write_text((folder / "garden/dataset.yaml").read_text(encoding="utf-8"))
            (folder / "garden/dataset.yaml").write_text(FILE, encoding="utf-8")
    text = FILE.replace("#e0205a", "#010203").replace("Plants and", "All")
    (folder / "garden/dataset.yaml").write_text(text, encoding="utf-8")
    again = ["train", "data.root=garden", "output=runs/garden", *SMALL, "train.max_steps=3"]
    codes.append(main(again))
    (folder / "garden/dataset.yaml").write_text(text.replace("unit: mm", "unit: cm"), encoding="utf-8")
    codes.append(main([*again, "train.max_steps=4"]))
    return codes


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_garden(folder / "garden")
    write_toys(folder)
    codes, results = start_world(follow, folder, seconds=500)()
    assert codes == [0]
    return folder, results[0]


def test_every_command_of_the_page_works_and_a_changed_meaning_is_refused(followed):
    folder, codes = followed
    assert len(COMMANDS) >= 10
    assert codes == [0] * (len(COMMANDS) + 1) + [2]
    log = (folder / "runs/garden/train.log").read_text()
    assert "data.description.tasks.depth.unit is mm there and cm here" in log
    assert "data.description.tasks.semseg.classes.4.color: [224, 32, 90] -> [1, 2, 3]" in log


def test_what_init_writes_is_the_pages_file_but_for_names_and_colours(followed):
    folder, _ = followed
    first, page = (yaml.safe_load((folder / name).read_text()) for name in ("first.yaml", "garden/dataset.yaml"))
    assert len(first["tasks"]["semseg"].pop("classes")) == len(page["tasks"]["semseg"].pop("classes")) == 12
    page["tasks"]["semseg"].pop("title")
    page["tasks"]["depth"]["unit"] = "mm"
    assert first == page


def test_the_description_travels_with_config_checkpoint_and_export(followed):
    folder, _ = followed
    (folder / "check.yaml").write_text(FILE, encoding="utf-8")
    page = description.read_description(folder / "check.yaml")
    assert recorded_settings(folder / "runs/packed/config.yaml").data.description == page
    with open_checkpoint(folder / "runs/packed/checkpoints/step_2") as checkpoint:
        saved = checkpoint.meta["settings"]["data"]["description"]
    assert description.DataSetDescription.model_validate(saved) == page
    card = load(folder / "exports/garden").card
    assert card.description == page and card.data == "garden"
    assert [task.title for task in card.tasks] == ["Plants and things", "Depth"]
    again = folder / "again.yaml"
    again.write_text(description.to_yaml(page))
    assert description.read_description(again) == page


def test_names_and_colours_are_in_predictions_scores_and_pages(followed):
    folder, _ = followed
    index = json.loads((folder / "predictions/predictions.json").read_text())
    semseg = index["tasks"][0]
    assert semseg["class_names"][ROSES] == "rose" and semseg["palette"][ROSES] == ROSE
    picture = Image.open(folder / "predictions/bed 01_semseg.png")
    assert picture.getpalette()[3 * ROSES :][:3] == ROSE
    assert np.load(folder / "predictions/bed 01.npz")["depth"].shape == (1, 48, 64)
    scores = json.loads((folder / "runs/garden/evaluation/metrics.json").read_text())
    assert "iou/lavender" in scores["results"]["semseg"]
    assert scores["results"] == json.loads((folder / "exports/garden/evaluation/metrics.json").read_text())["results"]
    page = (folder / "runs/garden/report.html").read_text()
    for text in ("Plants and things", "lavender", 'fill="#e0205a"'):
        assert text in page


def test_a_packed_folder_gives_the_run_of_the_folder(followed):
    folder, _ = followed
    first, second = (json.loads((folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()[2])
                     for name in ("garden", "packed"))  # fmt: skip
    assert first["kind"] == second["kind"] == "train" and first["losses"] == second["losses"]


def test_the_cards_colours_may_be_changed_by_hand(followed, tmp_path):
    folder, _ = followed
    out = tmp_path / "export"
    out.mkdir()
    (out / "model.safetensors").symlink_to(folder / "exports/garden/model.safetensors")
    card = json.loads((folder / "exports/garden/export.json").read_text())
    card["tasks"][0]["palette"][ROSES] = [9, 8, 7]
    (out / "export.json").write_text(json.dumps(card))
    assert load(out).tasks[0].palette[ROSES] == (9, 8, 7)
    card["tasks"][0]["palette"].pop()
    (out / "export.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"tasks.0: the palette of semseg has 11 colours, wanted 12"):
        load(out)


def test_data_sets_in_python_are_known_by_their_place(followed):
    folder, _ = followed
    summary = json.loads((folder / "runs/toys/summary.json").read_text())
    assert summary["data"] == "my_data:TOYS" and summary["metrics"].keys() == {"depth"}
    start = json.loads((folder / "runs/toys/metrics.jsonl").read_text().splitlines()[0])
    assert start["task_facts"]["depth"]["title"] == "Far away"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:THING", "data.name: got 'no_such_module:THING', wanted package.module:NAME"),
        ("json:dumps", "wanted an object of ase_dist.tasks.DataSet"),
        ("gardn.yaml", "data.name: 'gardn.yaml' is not there"),
        ("scene", "did you mean 'scenes'?"),
    ],
)
def test_names_of_no_data_set_are_told(name, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load_settings(None, [f"data.name={name}"])


@pytest.mark.nightly
def test_a_study_takes_the_folder(tmp_path):
    """Its runs are processes of their own, which know the description from their settings."""
    write_garden(tmp_path / "garden", images=10)
    (tmp_path / "garden/dataset.yaml").write_text(FILE, encoding="utf-8")
    small = [option for option in SMALL if not option.startswith(("train.max_steps", "model.moe."))]
    words = [sys.executable, "-m", "ase_dist", "study", "topk", "--only", "ase_k3", "--data", "garden", "--seeds", "1",
             "--steps", "1", "--out", "study", *small]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    results = json.loads((tmp_path / "study/results.json").read_text())
    (variant,) = (each for each in results["variants"] if each["name"] == "ase_k3")
    assert variant["metrics"].keys() == {"semseg", "depth"} and "iou/lavender" in variant["metrics"]["semseg"]
    assert results["task_facts"]["semseg"]["title"] == "Plants and things"
