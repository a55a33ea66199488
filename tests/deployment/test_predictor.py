"""``ase_dist.load(...).predict``: what the evaluation computes, at every image's own size, alone or in a batch."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import ase_dist
from ase_dist.data.batch import Record
from ase_dist.data.transforms import Transform
from ase_dist.deployment import predictor
from ase_dist.deployment.exported import ExportedModel
from ase_dist.evaluation.decode import decode
from ase_dist.tasks import NYUD_TASKS

from .conftest import make_export, photo

pytestmark = pytest.mark.single_gpu


def test_predictions_are_those_of_the_evaluation(model):
    """The same transform, model and decoding as in ``training.evaluate``, which the run's metrics come from."""
    image = photo(50, 70)
    found = model.predict([image])[0]
    sample = Transform(32, tasks=(), augmentation="none").eval_sample(Record(0, "", image, {}))
    logits = model(sample.image[None]).predictions
    assert list(found) == [task.name for task in model.tasks]
    for task in model.tasks:
        expected = decode(task, logits[task.name], size=(50, 70))[0].numpy()
        assert found[task.name].dtype == expected.dtype and found[task.name].shape == expected.shape
        np.testing.assert_array_equal(found[task.name], expected)


def test_a_batch_of_any_sizes_and_forms_predicts_each_as_alone(model, tmp_path):
    arrays = [photo(40, 56, seed=1), photo(33, 20, seed=2), photo(90, 64, seed=3)]
    Image.fromarray(arrays[2]).save(tmp_path / "c.png")
    together = model.predict([arrays[0], Image.fromarray(arrays[1]), tmp_path / "c.png"], batch_size=2)
    for array, found in zip(arrays, together, strict=True):
        alone = model.predict([array])[0]
        assert found["semseg"].shape == array.shape[:2] and found["normals"].shape == (3, *array.shape[:2])
        for name in alone:
            np.testing.assert_allclose(found[name].astype(float), alone[name].astype(float), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found["normals"], axis=0), 1, atol=1e-5)
    assert 0 <= found["edge"].min() < found["edge"].max() <= 1
    assert model.predict([]) == []


def test_a_subset_of_tasks_is_computed_alone_and_equals_the_whole(model):
    image, streams = photo(), []
    everything = model.predict([image])[0]
    hook = model.model.blocks[0].register_forward_pre_hook(lambda _, args: streams.append(args[0].shape[0]))
    some = model.predict([image], tasks=["edge", "normals"])[0]
    hook.remove()
    assert streams == [2] and some.keys() == {"edge", "normals"}
    for name in some:
        np.testing.assert_allclose(some[name], everything[name], atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_strips_equal_the_whole(rows, model, monkeypatch):
    """Each row of the resized logits depends on two rows of the head's, wherever a strip begins."""
    for task in (*model.tasks, NYUD_TASKS["depth"]):
        logits = torch.randn(1, task.channels, 13, 11, generator=torch.Generator().manual_seed(0))
        whole = decode(task, logits, size=(50, 31))[0].numpy()
        monkeypatch.setattr(predictor, "MOST_LOGITS", rows * task.channels * 31)
        found = predictor.decode_strips(task, logits, (50, 31))
        assert found.dtype == whole.dtype and found.shape == whole.shape
        if task.kind == "classes":
            assert (found == whole).mean() > 0.999  # two logits may be equal to rounding
        else:
            np.testing.assert_allclose(found, whole, atol=1e-5)


def test_depth_is_in_metres_of_the_model(tmp_path):
    model = ase_dist.load(make_export(tmp_path / "nyud", data="nyud", tasks=["depth"]))
    assert model.predict([photo()])[0]["depth"].shape == (1, 40, 56)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (photo(), {}, r"got one image, wanted a list"),
        ("a.png", {}, r"got one image, wanted a list"),
        ([photo(), np.zeros((2, 2, 2))], {}, r"predict: image 1: got an array \[2, 2, 2\]"),
        (["nowhere.png"], {}, r"predict: image 0: nowhere\.png: .*No such file"),
        ([photo()], {"tasks": ["depth"]}, r"no task 'depth'"),
        ([photo()], {"batch_size": 0}, r"batch_size: got 0"),
    ],
)
def test_mistakes_are_told(images, options, message, model):
    with pytest.raises(ValueError, match=message):
        model.predict(images, **options)


SCRIPT = """
import sys
sys.modules["deepspeed"] = sys.modules["fairscale"] = None
import numpy, ase_dist
found = ase_dist.load(sys.argv[1]).predict([numpy.full((20, 30, 3), 9, numpy.uint8)], tasks=["edge"])
assert found[0]["edge"].shape == (20, 30)
"""


def test_neither_deepspeed_nor_fairscale_is_needed(export):
    assert isinstance(ase_dist.load(export), ExportedModel)
    subprocess.run([sys.executable, "-c", SCRIPT, str(export)], check=True, timeout=120)
