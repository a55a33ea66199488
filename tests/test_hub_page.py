"""docs/hub.md followed against a hub on this machine: every command, and the example in Python."""

import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save

from tests.hub_server import client_settings, serve
from tests.test_own_data import SMALL
from tests.training.conftest import start_world

pytestmark = pytest.mark.single_gpu

PAGE = (Path(__file__).parents[1] / "docs" / "hub.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
TINY = [word for word in SMALL if not word.startswith("model.pretrained")]
SCENES = ["data.root=scenes", "data.scenes.train_images=8", "data.scenes.val_images=2", "data.scenes.size=40"]


def follow(rank, folder):
    """Every command in one process, with a tiny model; the hub answers in the same process."""
    import timm
    from huggingface_hub import constants
    from PIL import Image

    from ase_dist.commands.main import main
    from ase_dist.training.process import runtime
    from ase_dist.training.record import plots

    runtime.stop = lambda: None  # DeepSpeed joins a process group once in a process
    plots.draw_all = lambda folder: None  # which takes longer than such a run
    os.chdir(folder)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save("photo.jpg")
    with serve() as hub:
        for name, value in client_settings(hub.url, folder / "cache").items():
            setattr(constants, name, value)
        os.environ["HF_TOKEN"] = hub.token
        vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2)
        hub.put("timm/vit_small_patch14_dinov2.lvd142m", {"model.safetensors": save(vit.state_dict())})
        first = main(["train", "output=runs/scenes", *SMALL, *SCENES])
        codes = []
        for line in LINES:
            program, *words = shlex.split(line.replace("OWNER", "me"))
            assert program == "ase-dist"
            added = {"train": [*TINY, *SCENES], "evaluate": SCENES}.get(words[0], [])
            codes.append(main([*words, *added]))
        (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
        found = {}
        exec(code.replace("OWNER", "me"), found)
        return first, codes, found["model"].card.step, sorted(hub.files("me/scenes"))


def test_every_command_of_the_page_works(tmp_path):
    codes, results = start_world(follow, tmp_path, seconds=400)()
    assert codes == [0]
    first, codes, step, files = results[0]
    assert first == 0 and codes == [0] * len(LINES) and len(LINES) == 7
    assert step == 2 and files == ["README.md", "export.json", "model.safetensors"]
    assert (tmp_path / "programs" / "model.pt2").is_file() and (tmp_path / "evaluation" / "metrics.md").is_file()
    report = (tmp_path / "evaluation" / "metrics.md").read_text()
    assert re.search(r"scenes@[0-9a-f]{40}", report) and "snapshots" not in report
