"""Runs on rectangles: two ranks, resumed, exported, as programs, predicting; the configs of large inputs."""

import json
import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

import ase_dist
from ase_dist.data.transforms import normalise
from ase_dist.deployment.export import export_run
from ase_dist.deployment.programs import deploy
from ase_dist.evaluation.decode import decode
from ase_dist.read_config import load_settings
from ase_dist.training.loop import run
from ase_dist.training.process import runtime
from tests.training.conftest import start_world
from tests.training.test_run_nyud import TASKS, write_folder
from tests.training.tiny_runs import TINY, checkpoint, ds_config, losses, same_bits

pytestmark = pytest.mark.single_gpu
HEIGHT, WIDTH = 32, 48
SHORT = [
    *(each for each in TINY if not each.startswith(("data.size", "data.scenes", "model.head", "train.batch_size"))),
    "model.head_width=8",
    "data.workers=0",
    "data.limit_train=4",
    "data.limit_val=2",
    "train.batch_size=1",
    "train.warmup_steps=0",
    "eval.every=0",
    "eval.batch_size=1",
]


def train(config, output, *overrides):
    settings = load_settings(config, [*SHORT, f"output={output}", *overrides])
    world = runtime.start(timeout=60, threads=1)
    return int(run.train(settings, ds_config("z1"), world))


def two_ranks(rank, folder):
    """Three steps at once; the last one again, resumed; and where the size is turned."""
    again = (
        f"data.root={folder / 'NYUD_MT'}",
        f"data.size={HEIGHT}x{WIDTH}",
        "train.max_steps=3",
        "checkpoint.every=2",
    )
    codes = [train("nyud_ase_16_3_1_4", folder / "whole", *again)]
    resume = f"resume={folder / 'whole/checkpoints/step_2'}"
    codes.append(train("nyud_ase_16_3_1_4", folder / "resumed", *again, resume))
    try:
        codes.append(train("nyud_ase_16_3_1_4", folder / "turned", *again, resume, f"data.size={WIDTH}x{HEIGHT}"))
    except ValueError as error:
        codes.append(str(error))
    return codes


def one_rank(rank, folder):
    data = (f"data.root={next(folder.glob('scenes-*'))}", "data.size=64")
    return train("pascal_ase_16_3_1_4_512", folder / "large", *data, "train.max_steps=1", "checkpoint.every=0")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rectangles")
    write_folder(folder / "NYUD_MT")
    codes, results = start_world(two_ranks, folder, size=2, seconds=300)()
    assert codes == [0, 0]
    return folder, results[0]


def test_the_config_of_nyud_trains_on_two_ranks_and_resumes_bit_for_bit(runs):
    folder, results = runs
    assert results[:2] == [0, 0]
    found = losses(folder / "whole")
    assert all(math.isfinite(value) for step in found.values() for value in step.values())
    assert not same_bits(checkpoint(folder / "whole", 3), checkpoint(folder / "resumed", 3))
    assert "data.size is [32, 48] there and [48, 32] here" in results[2]
    summary = json.loads((folder / "whole" / "summary.json").read_text())
    assert set(TASKS) <= set(summary["metrics"])
    assert "size:\n  - 32\n  - 48\n" in (folder / "whole" / "config.yaml").read_text()


def test_a_rectangular_run_exports_and_predicts(runs, tmp_path):
    folder, _ = runs
    export_run(folder / "whole", tmp_path / "out")
    card = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (card["image"]["size"], card["version"]) == ([HEIGHT, WIDTH], 3)
    model = ase_dist.load(tmp_path / "out")
    formats = ["pt2", "onnx"] if find_spec("onnxruntime") else ["pt2"]
    errors = deploy(model, tmp_path / "out", formats=formats, tasks=["depth"])
    assert max(errors.values()) < 1e-4
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    found = model.predict([photo])[0]
    resized = Image.fromarray(photo).transform(
        (WIDTH, HEIGHT), Image.Transform.AFFINE, (60 / WIDTH, 0, 0, 0, 40 / HEIGHT, 0), Image.Resampling.BICUBIC
    )
    with torch.no_grad():
        logits = model(normalise(np.asarray(resized))[None]).predictions
    for task in model.tasks:
        expected = decode(task, logits[task.name], size=(40, 60))[0].numpy()
        assert found[task.name].shape == expected.shape and found[task.name].shape[-2:] == (40, 60)
        np.testing.assert_allclose(found[task.name], expected, atol=1e-4)


def test_the_configs_sizes():
    assert load_settings("nyud_ase_16_3_1_4").data.size == (448, 576)
    assert load_settings("pascal_ase_16_3_1_4_512").data.size == (512, 512)


def test_the_config_of_512_pixels_trains(scenes, tmp_path):
    place = next(scenes.glob("scenes-*"))
    (tmp_path / place.name).symlink_to(place)
    assert start_world(one_rank, tmp_path, seconds=200)() == ([0], [0])
    assert all(map(math.isfinite, losses(tmp_path / "large")[1].values()))
