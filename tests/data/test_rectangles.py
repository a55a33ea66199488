"""Rectangles from a described folder and from the same packed, under every preset of augmentation."""

import pytest
import torch

from ase_dist.commands.prepare_data import main
from ase_dist.data.loader import build_eval_loader, build_train_loader
from ase_dist.read_config import load_settings
from ase_dist.registries import AUGMENTATIONS
from tests.test_own_data import FILE, write_garden

pytestmark = pytest.mark.single_gpu
HEIGHT, WIDTH = 32, 56


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rectangles")
    write_garden(folder / "garden", images=6)
    (folder / "garden/dataset.yaml").write_text(FILE)
    assert main([str(folder / "garden"), "--out", str(folder / "packed"), "--workers", "1"]) == 0
    return folder / "garden", folder / "packed"


@pytest.mark.parametrize("preset", AUGMENTATIONS)
def test_a_packed_folder_gives_the_rectangles_of_the_folder(roots, preset):
    changes = [f"data.size={HEIGHT}x{WIDTH}", f"data.augmentation={preset}", "train.batch_size=2", "eval.batch_size=1"]
    both = [load_settings(None, [f"data.root={root}", *changes]) for root in roots]
    loaders = [build_train_loader(s, s.chosen_tasks(), rank=0, world_size=1) for s in both]
    whole = load_settings(None, [f"data.root={roots[0]}", *changes, f"data.size={HEIGHT}"])
    squares = build_train_loader(whole, whole.chosen_tasks(), rank=0, world_size=1)
    for _ in range(4):
        one, two = map(next, loaders)
        assert one.names == two.names == next(squares).names
        assert one.images.shape == (2, 3, HEIGHT, WIDTH) and torch.equal(one.images, two.images)
        for task, shape in {"semseg": (2, HEIGHT, WIDTH), "depth": (2, 1, HEIGHT, WIDTH)}.items():
            assert one.labels[task].shape == shape and torch.equal(one.labels[task], two.labels[task]), task
        assert (one.labels["depth"] > 0).any() and (one.labels["semseg"] < 12).any()
    found = [list(build_eval_loader(s, s.chosen_tasks(), rank=0, world_size=1)) for s in both]
    for one, two in zip(*found, strict=True):
        assert one.images.shape == (1, 3, HEIGHT, WIDTH) and torch.equal(one.images, two.images)
