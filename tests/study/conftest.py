"""What the tests of studies share: a toy preset on tiny scenes, and runs made in this process."""

import dataclasses
import logging

import pytest
import yaml

from ase_dist.study import presets, runner
from ase_dist.training.loop import run
from ase_dist.training.process import runtime
from ase_dist.training.record import plots
from tests.training.tiny_runs import TINY

TASKS = ["semseg", "edge", "normals"]


@pytest.fixture
def toy(scenes, tmp_path, monkeypatch):
    """The preset "toy": three steps of a tiny model on three tasks of tiny scenes."""
    tree = {"tasks": TASKS}
    for override in TINY:
        key, _, value = override.partition("=")
        *path, name = key.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[name] = yaml.safe_load(value)
    tree["data"]["root"] = str(scenes)
    tree["model"]["moe"] = {}  # the rows say which experts
    tree["checkpoint"] = {"every": 0}
    tree["train"]["batch_size"] = 2
    tree["train"]["lr"] = 1e-3
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(tree))
    preset = presets.Preset(
        str(path), "toy scenes", steps=3, pair=("semseg", "edge"), sizes=(32, 48),
        changes=presets.QUIET, backbones={
            "resnet18": {"model.backbone_args": {"channels": [8, 8, 8, 8]}},
            "swin_tiny_patch4_window7_224": {
                "model.backbone_args": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}
            },
        },
    )  # fmt: skip
    monkeypatch.setitem(presets.PRESETS, "toy", preset)
    return preset


@pytest.fixture
def in_process(monkeypatch):
    """Runs of a study happen here, one after the other, plots left out; yields the names of those that ran."""
    names = []

    class Done:
        returncode = 0

        def poll(self):
            return self.returncode

    @dataclasses.dataclass
    class Running:
        job: object
        slot: int
        slots: object
        began: float = 0.0
        log: str = ""

        def __post_init__(self):
            self.name, self.process = self.job.name, Done()
            names.append(self.name)
            world = runtime.start(timeout=60, threads=1)
            run.train(self.job.settings, {}, world)

    monkeypatch.setattr(runner, "_Running", Running)
    monkeypatch.setattr(runner, "POLL", 0.0)
    monkeypatch.setattr(plots, "draw_all", lambda folder: [])
    yield names
    logging.getLogger("ase_dist").handlers.clear()
